"""More evaluations of a finished run: from the checkpoints that it kept, equal to a run that measured at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import fedsim
from fedsim.api import run
from fedsim.config.compose import compose
from fedsim.run.denser import MARKER
from fedsim.server import checkpoint
from fedsim.server.loop import Loop
from fedsim.tracking import read_rows

BASE = [
    *("data=blobs", "data.num_samples=150", "data.num_test=30", "model=linear", "engine=serial", "rounds=6"),
    *("num_clients=4", "clients_per_round=2", "client.batch_size=16", "client.epochs=1", "name=t"),
    *("tracker=quiet", "tracker.plots=false", "checkpoint.every=1"),
]
SCAFFOLD = ["strategy=scaffold"]
PERSONAL = ["strategy=ditto", "evaluation.holdout=0.3"]
VALIDATED = ["strategy=fedavg", "evaluation.validation=0.2", "evaluation.client_validation=0.1"]


def train(place: Path, *words: str) -> fedsim.RunResult:
    return run(compose([*BASE, *words, f"out={place}"]))


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that are computed from here on."""
    seen: list[int] = []
    plain = Loop._round

    def noted(self: Any) -> None:
        seen.append(self.done + 1)
        plain(self)

    monkeypatch.setattr(Loop, "_round", noted)
    return seen


def compared(folder: Path, name: str = "metrics.jsonl") -> list[Any]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / name)]
    return [r for r in rows if not str(r.get("metric")).endswith("seconds")]


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        (SCAFFOLD, ["evaluation.every=6"], ["evaluation.every=2"]),
        (PERSONAL, ["evaluation.every=3"], ["evaluation.every=1", "evaluation.clients_every=2"]),
        (VALIDATED, ["evaluation.every=6"], ["evaluation.every=1"]),
    ],
    ids=["client state", "personal models", "validation"],
)
def test_it_equals_a_run_that_measured_at_once(
    words: list[str], before: list[str], after: list[str], tmp_path: Path, rounds: list[int]
) -> None:
    straight = train(tmp_path / "straight", *words, *after)
    first = train(tmp_path / "kept", *words, *before, "checkpoint.keep=all")
    rounds.clear()
    again = train(tmp_path / "kept", *words, *after)
    assert rounds == [] and again.dir != first.dir
    assert compared(again.dir) == compared(straight.dir)
    one, other = (compared(r.dir, "clients.jsonl") for r in (again, straight))
    assert one == other
    timing = {"seconds"}
    assert {k: v for k, v in again.summary.items() if k not in timing} == {
        k: v for k, v in straight.summary.items() if k not in timing
    }
    best = [r.dir / "weights_best.safetensors" for r in (again, straight)]
    if best[1].exists():
        found = [safe_open(path, "pt") for path in best]
        assert found[0].metadata() == found[1].metadata()
        assert all((found[0].get_tensor(k) == found[1].get_tensor(k)).all() for k in found[1].keys())  # noqa: SIM118
    assert json.loads((again.dir / "summary.json").read_text())["status"] == "done"
    assert not (again.dir / MARKER).exists()
    assert compared(first.dir) == compared(train(tmp_path / "kept", *words, *before).dir)  # untouched


def test_interrupted_while_it_measures_it_goes_on(
    tmp_path: Path, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tmp_path / "straight", *SCAFFOLD, "evaluation.every=1")
    train(tmp_path / "kept", *SCAFFOLD, "evaluation.every=6", "checkpoint.keep=all")
    rounds.clear()

    def interrupted(self: Any, path: Path) -> None:
        if checkpoint.rounds_of(path) == 3:
            raise KeyboardInterrupt
        plain(self, path)

    plain = Loop.restore
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(Loop, "restore", interrupted)
        train(tmp_path / "kept", *SCAFFOLD, "evaluation.every=1")
    again = train(tmp_path / "kept", *SCAFFOLD, "evaluation.every=1")
    assert rounds == [] and compared(again.dir) == compared(straight.dir)


def test_more_rounds_go_on_from_what_was_measured(tmp_path: Path, rounds: list[int]) -> None:
    words = [*SCAFFOLD, "evaluation.every=2"]
    straight = train(tmp_path / "straight", *words, "rounds=8")
    train(tmp_path / "kept", *SCAFFOLD, "evaluation.every=6", "checkpoint.keep=all")
    rounds.clear()
    assert compared(train(tmp_path / "kept", *words, "rounds=8").dir) == compared(straight.dir)
    assert rounds == [7, 8]


@pytest.mark.parametrize(
    "words",
    [
        ["evaluation.every=1", "checkpoint.keep=every:2"],  # those of odd rounds are gone
        ["evaluation.every=4"],  # was measured where the new run is not
        ["evaluation.every=1", "client.lr=0.2"],
        ["evaluation.every=1", "seed=1"],
        ["evaluation.every=1", "rounds=4"],
        ["evaluation.every=1", "resume=never"],
    ],
)
def test_otherwise_it_is_computed(words: list[str], tmp_path: Path, rounds: list[int]) -> None:
    keep = [w for w in words if w.startswith("checkpoint.keep")] or ["checkpoint.keep=all"]
    train(tmp_path, *SCAFFOLD, "evaluation.every=3", *keep)
    rounds.clear()
    result = train(tmp_path, *SCAFFOLD, *words)
    assert rounds == list(range(1, result.summary["rounds"] + 1))
