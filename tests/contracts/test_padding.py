"""Padding between the slots of flat vectors: under every strategy it stays zero, and nobody could tell it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from problems import Recorded, classification, hashes, network, recorded
from registry import METHODS, SPREAD, TABLE, Entry, often
from torch import Tensor

from fedsim.exchange.fold import Folder
from fedsim.server import checkpoint
from fedsim.task import slots
from fedsim.task.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("cat_map", "lotka_volterra")  # attacks on images
ATTACKS = sorted({path.stem for path in (ROOT / "conf/attack").glob("*.yaml")} - {"none", *IMAGES})

NIGHTLY = pytest.mark.nightly
each_entry = pytest.mark.parametrize("entry", often(TABLE, *SPREAD), ids=lambda e: e.label)


def record(entry: Entry, *overrides: str, **given: Any) -> tuple[Recorded, Any]:
    problem = classification(entry.model("bn"))
    return recorded(entry.strategy, problem, *entry.overrides, "rounds=2", *overrides, **given)


def dirty(arrays: Mapping[str, Any], layout: Layout) -> list[str]:
    """Names of vectors with anything in their padding."""
    return [
        name
        for name, t in arrays.items()
        for part in (layout.params, layout.buffers)
        if isinstance(t, Tensor) and t.dim() and part.padded and t.shape[-1] == part.dim
        if t[..., part.gaps].any()
    ]


@each_entry
def test_padding_of_states_and_updates_stays_zero(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, sent = Layout(network(entry.model("bn"))), list[str]()
    assert layout.params.padded
    add = Folder.add

    def watched(self: Folder, arrays: Mapping[str, Tensor], weight: float) -> None:
        sent.extend(name for name, t in arrays.items() if t.dim() and t.shape[-1] == layout.dim)
        assert dirty(arrays, layout) == []
        add(self, arrays, weight)

    monkeypatch.setattr(Folder, "add", watched)
    monkeypatch.setattr("problems.noted", lambda state, _: {**state})
    strategy, _ = record(entry, "buffers=average" if entry.strategy != "silobn" else "buffers=local")
    vectors = [
        k for k, t in strategy.states[-1].items() if isinstance(t, Tensor) and t.shape[-1:] == (layout.dim,)
    ]
    assert vectors and (sent or entry.parts or entry.scalars)
    for state in (*strategy.states, *strategy.kept[-1]):
        assert dirty(state, layout) == []


def both(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[Any, Any]:
    """The same run with padding and without."""
    aligned = record(*arguments)[1]
    monkeypatch.setattr(slots, "ALIGNMENT", 1)
    assert not Layout(network("bn")).params.padded
    return aligned, record(*arguments)[1]


def check_alike(aligned: Any, dense: Any) -> None:
    for name, value in dense.weights.items():
        torch.testing.assert_close(aligned.weights[name], value, rtol=0, atol=1e-11)
    for key in ("bytes_up", "bytes_down", "cohort", "failures"):
        assert [r[key] for r in aligned.rows] == [r[key] for r in dense.rows]
    assert aligned.summary["sim_seconds" if "sim_seconds" in dense.summary else "rounds"]


@pytest.mark.parametrize("entry", often(METHODS, *SPREAD), ids=lambda e: e.label)
def test_results_and_bytes_are_those_without_padding(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    check_alike(*both(monkeypatch, entry, "dtype=float64"))


@pytest.mark.parametrize(
    "attack", [pytest.param(a, marks=[] if a in ("alie", "random_gaussian") else NIGHTLY) for a in ATTACKS]
)
def test_attacks_draw_and_send_what_they_would_without_padding(
    attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry("fedavg", "fedavg", (f"attack={attack}", "attack.fraction=0.34"))
    check_alike(*both(monkeypatch, entry, "dtype=float64", "clients_per_round=6"))


def test_the_hash_of_the_first_model_is_the_same_with_and_without_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cohort of nobody leaves the initial weights, whose bits no arithmetic touches."""
    runs = []
    for alignment in (64, 1):
        monkeypatch.setattr(slots, "ALIGNMENT", alignment)
        runs.append(classification("bn", cohorts=[[]]).run("strategy=fedavg", "rounds=1"))
    assert hashes(runs[0]) == hashes(runs[1])


OLD = (
    ("scaffold", ()),
    ("moon", ()),
    ("fedavg", ("buffers=all_local",)),
    ("fedadam", ("buffers=local",)),
    ("gossip", ("topology=ring",)),
    ("fedbuff", ("system=lognormal", "strategy.concurrency=2", "strategy.buffer=3")),
)


@pytest.mark.parametrize(
    "memory", [pytest.param(100, id="in memory", marks=NIGHTLY), pytest.param(0, id="spilled")]
)
@pytest.mark.parametrize(("strategy", "more"), OLD, ids=[name for name, _ in OLD])
def test_a_run_that_was_checkpointed_without_padding_goes_on_with_it(
    strategy: str, more: tuple[str, ...], memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = classification("bn", settings=(*classification().settings, "rounds=5"))
    settings = [f"strategy={strategy}", *more, "dtype=float64", f"checkpoint.memory_mb={memory}"]
    expected, place = problem.run(*settings), f"dir={tmp_path / 'run'}"
    with monkeypatch.context() as before, pytest.raises(KeyboardInterrupt):
        before.setattr(slots, "ALIGNMENT", 1)
        before.setattr(checkpoint, "FORMAT", 1)
        problem.run(*settings, place, callbacks=[Interrupt(3)])
    with pytest.raises(KeyboardInterrupt):  # what is saved then are the states of absent clients too
        problem.run(*settings, place, callbacks=[Interrupt(4)])
    resumed = problem.run(*settings, place)
    assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4, 5]
    for name, value in expected.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, rtol=0, atol=1e-11)
