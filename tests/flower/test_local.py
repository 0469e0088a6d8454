"""The apps on a grid in this process: every message passes through Flower's wire format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from localgrid import LocalGrid, deploy
from real import ROOT
from registry import AT_SERVER, BOXES, SPREAD, TABLE, Entry, often

import fedsim
from fedsim.errors import ConfigError

SMALL = ("rounds=2", "clients_per_round=2", "model=linear", "client.epochs=1", "engine.chunks=2")
FRAMING = 2000  # bytes that Flower's records add to a message, at most
REFUSED = {  # by name: what a deployment cannot be
    "centralised": "Centralised needs all data in one place",
    "mezo": "MeZO needs all data in one place",
    "fedasync": "FedAsync starts clients at simulated times",
    "fedbuff": "FedBuff starts clients at simulated times",
    "gossip_async": "AsyncGossip starts clients at simulated times",
}
WIDTHS = "client.classes=[{share: 0.5, width: 1}, {share: 0.5, width: 0.5}]"
FURTHER = (  # options that the contract table leaves to tests of their own
    Entry("dpsgd", "dpsgd", ("topology=ring",)),
    Entry("gossip-fedavg", "gossip_fedavg", ("topology=complete",)),
    Entry("heterofl", "heterofl", (WIDTHS,), needs_head=True),
    Entry("local-only", "local_only"),
    Entry("server-only", "server_only", ("data.labelled={at: server, count: 30}",)),
    Entry("fixmatch-server", "fixmatch", (*AT_SERVER, "strategy.tau=0.2")),
    Entry("pseudo-ema", "pseudo_ema", (*AT_SERVER, *BOXES, "strategy.lo=0.06"), needs_head=True),
    Entry("fedbn", "fedbn"),
    Entry("ffa", "ffa", ('strategy.frozen=["*.bias"]',)),
    Entry("fedsa", "fedsa", ('strategy.local=["*.bias"]',)),
    Entry("fraug-digits", "fraug_digits", ("strategy.rounds=6",), needs_head=True),
    Entry(
        "fedossl-as-code",
        "fedossl_as_code",
        ("strategy.server_steps=10", "strategy.centroids=4"),
        needs_head=True,
    ),
    Entry("fed-ao", "fed_ao", needs_head=True),
    Entry("fraug-officehome", "fraug_officehome", ("strategy.rounds=6",), needs_head=True),
)
DEPLOYED = [e for e in (*TABLE, *FURTHER) if e.strategy not in REFUSED and not e.has("system")]
ATTACKS = sorted(path.stem for path in (ROOT / "conf/attack").glob("*.yaml") if path.stem != "none")


def simulated(*overrides: str, clients: int = 3) -> fedsim.RunResult:
    return fedsim.simulate([f"num_clients={clients}", "engine=serial", "tracker=quiet", *overrides])


def counted(rows: list[dict[str, Any]], key: str) -> int:
    """Bytes of all rounds, phases that are reported apart included."""
    apart = [v for row in rows for v in row.values() if isinstance(v, dict) and key in v]
    return sum(row[key] for row in [*rows, *apart])


def check_twin(folder: Path, *settings: str) -> LocalGrid:
    """A deployment on a local grid has the bits of its simulation, and its bytes are those on the wire."""
    twin, grid = deploy(folder, *settings)
    alone = simulated(*settings)
    assert [r["weights_hash"] for r in twin.rows] == [r["weights_hash"] for r in alone.rows]
    phases = [k for k, v in alone.rows[0].items() if isinstance(v, dict) and "bytes_up" in v]
    for key in ("accuracy", "loss", "bytes_up", "bytes_down", "cohort", "train_loss"):
        assert [r.get(key) for r in twin.rows] == [r.get(key) for r in alone.rows], key
    messages = sum(kind == "train" for _, kind, _ in grid.log)
    for key, measured in (("bytes_up", grid.bytes_up), ("bytes_down", grid.bytes_down)):
        assert [r[p][key] for r in twin.rows for p in phases if p in r] == [
            r[p][key] for r in alone.rows for p in phases if p in r
        ]
        assert 0 <= measured - counted(alone.rows, key) <= FRAMING * messages, key
    return grid


ONCE = (*SPREAD, "moon", "fedossl", "fedmatch", "fed-ao")


@pytest.mark.parametrize("entry", often(DEPLOYED, *ONCE), ids=lambda e: e.label)
def test_every_method_gives_the_bits_and_bytes_of_its_simulation(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_ALLOW", "problems")  # what some methods' settings name
    model = ["model=mlp"] if entry.needs_head else []
    check_twin(tmp_path, *SMALL, *model, *entry.arguments)


def test_what_is_left_out_does_not_travel_here_either(tmp_path: Path) -> None:
    """FedMatch's frames and places of what is not zero, and its learning rate, which falls on a plateau."""
    entry = next(e for e in TABLE if e.label == "fedmatch")
    cut = ("strategy.sparse={small: 0.02, change: 0.002}", "strategy.plateau={patience: 1, factor: 2}")
    check_twin(tmp_path, *SMALL, "model=mlp", *entry.arguments, *cut, "evaluation.validation=0.1")


@pytest.mark.parametrize(
    "given",
    [
        ("evaluation.by_class=true", "evaluation.clients_every=1", "evaluation.holdout=0.2"),
        ("strategy=fedkseed", "strategy.lr=0.1", "evaluation.clients_every=1", "evaluation.holdout=0.2"),
        ("strategy=one_byte", "strategy.lr=0.1", "evaluation.clients_every=1", "evaluation.holdout=0.2"),
        ("strategy=decomfl", "strategy.lr=0.1", "evaluation.clients_every=1", "evaluation.holdout=0.2"),
    ],
    ids=["groups of classes", "over a thousand bytes", "one_byte", "decomfl"],
)
def test_what_the_servers_own_answer_has_not_is_taken_of_honest_clients(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    twin, _ = deploy(tmp_path, *SMALL, *given)
    alone = simulated(*SMALL, *given)
    for key in ("weights_hash", "failures", "accuracy", "clients/accuracy", "clients/few/accuracy"):
        assert [r.get(key) for r in twin.rows] == [r.get(key) for r in alone.rows], key
    assert not any(row["failures"] for row in twin.rows)


def test_roles_are_those_of_the_simulation(tmp_path: Path) -> None:
    settings = (
        *SMALL,
        "data.labelled={at: client, share: 0.5}",
        "evaluation.validation=0.1",
        "evaluation.client_validation=0.1",
        "evaluation.holdout=0.1",
        "evaluation.clients_every=1",
        "evaluation.held_out_clients=0.3",
        "evaluation.held_out_steps=2",
    )
    twin, _ = deploy(tmp_path, *settings)
    alone = simulated(*settings)
    assert twin.summary["weights_hash"] == alone.summary["weights_hash"]
    for key in ("val/loss", "clients_val/loss", "clients/loss", "held_out/loss", "participation_gap"):
        assert [r[key] for r in twin.rows] == [r[key] for r in alone.rows], key


def test_a_model_for_some_clients_alone_is_refused(tmp_path: Path) -> None:
    classes = "client.classes=[{share: 1}, {share: 1, model: mlp}]"
    with pytest.raises(ConfigError, match=r"client\.classes: nodes agree on one model before round 1"):
        deploy(tmp_path, "strategy=one_shot", *SMALL, classes)


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_what_cannot_be_deployed_is_refused_by_name(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"strategy: {REFUSED[option]}.*; simulate it"):
        deploy(
            tmp_path,
            f"strategy={option}",
            *SMALL,
            *(["strategy.lr=0.1"] if option == "mezo" else []),
            "topology=ring" if "gossip" in option else "topology=server",
        )


def test_every_strategy_is_either_deployed_or_refused_here() -> None:
    tried = {e.strategy for e in DEPLOYED} | {
        "fedex",
        "fedit",
        "flora",
        "ranked_lora",
    }  # see tests/flower/test_adapted.py
    assert tried | set(REFUSED) == {path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")}


NOW = ("alie", "label_flip", "reverse")  # sees everything, changes samples, changes updates


@pytest.mark.parametrize(
    "attack", [pytest.param(a, marks=[] if a in NOW else pytest.mark.nightly) for a in ATTACKS]
)
def test_attackers_are_nodes_too(attack: str, tmp_path: Path) -> None:
    """The same clients attack, at their nodes; those that see everything are played by the server."""
    settings = (*SMALL, f"attack={attack}", "attack.fraction=0.34", "clients_per_round=3")
    check_twin(tmp_path, *settings, "aggregator=coordinate_median")


F1 = "+task.metrics={f1: {_target_: torchmetrics.F1Score, task: multiclass, num_classes: 10, average: macro}}"
DETECTION = (
    "task=detection",
    "data=weather_shapes",
    "data.train={cloudy: 8, overcast: 8, rainy: 8, snowy: 8}",
    "data.test=4",
    "data.side=32",
    "data.shapes=[9,16]",
    "model=detector",
    "model.channels=[4,4,4,4,4]",
    "data.domains=[cloudy,overcast,rainy]",
    "partition=domains",
)


@pytest.mark.parametrize(
    "task",
    [("task.label_smoothing=0.1", F1, "evaluation.clients_every=1", "evaluation.holdout=0.2"), DETECTION],
)
def test_a_deployment_learns_the_configured_task(task: tuple[str, ...], tmp_path: Path) -> None:
    settings = (
        "rounds=2",
        "clients_per_round=2",
        "client.epochs=1",
        *([] if task is DETECTION else ["model=linear"]),
        *task,
    )
    twin, _ = deploy(tmp_path, *settings)
    alone = fedsim.simulate(["num_clients=3", "engine=serial", "tracker=quiet", *settings])
    told = [k for k, v in alone.rows[-1].items() if isinstance(v, float) and "seconds" not in k]
    assert any("f1" in k or "map_50" in k for k in told)
    assert [[r.get(k) for k in told] for r in twin.rows] == [[r.get(k) for k in told] for r in alone.rows]
