"""What leaves a node: frames travel, the server decodes them before the fold, and believes none of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from flwr.app import Array, ArrayRecord, Error
from hooks import Fail, hooked

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from localgrid import asked, deploy
from registry import Entry
from test_local import DEPLOYED, SMALL, check_twin, simulated

import fedsim
from fedsim.errors import ConfigError

RING = ("secagg=ring", "secagg.reach=1")
MASKS = ("secagg=masks", "secagg.reach=1")
DOWN = "compression.down={codec: qsgd, levels: 127}"
KEYED = ("privacy.z=1", "privacy.delta=1e-2", "privacy.noise=keyed", "privacy.metrics=plain")
UNIFORM = "strategy.weighting=uniform"
ADAPTIVE = ("privacy.clip=adaptive", "privacy.adaptive.noise=2", "participation=bernoulli")
TWINS = (
    ("strategy=scaffold", "compression=top_k", DOWN),
    ("strategy=scaffold", *MASKS),
    ("privacy=client", "compression=qsgd", *KEYED, *ADAPTIVE, UNIFORM),
    ("compression=random_k", "compression.shared=true", *MASKS),
    ("strategy=logit_adjust", "strategy.prior=all", "rounds=1", *MASKS),
    ("rounds=4", "compression=sign", "compression.down={codec: top_k, rate: 0.05}"),
)
MORE = (
    ("strategy=feddyn", *RING),
    ("strategy=fedavg", "compression=qsgd", "compression.feedback=true"),
    ("strategy=fedavg", "compression=rotate", "model=mlp"),
    ("strategy=fedavg", "compression=random_k", "compression.scale=contractive"),
    ("strategy=fedavg", "compression=low_rank", "compression.rank=1"),
    ("strategy=fedavg", "compression=sign"),
    ("privacy=client", "strategy=scaffold", *KEYED, UNIFORM, "secagg=masks"),
    (
        "privacy=client",
        "privacy.mechanism=banded",
        *KEYED,
        UNIFORM,
        "sampling=round_robin",
        "clients_per_round=1",
    ),
    ("privacy=client", "privacy.where=distributed", *KEYED, UNIFORM, "secagg=masks", "privacy.least=2"),
    ("privacy=local", "compression=rotate", *KEYED, UNIFORM),
    ("privacy=client", "compression=rotate", "compression.shared=true", *KEYED, UNIFORM, *MASKS[:1]),
    ("privacy=client", "strategy=scaffold", *KEYED, *ADAPTIVE, UNIFORM, *MASKS[:1]),
    ("strategy=fedavg", "compression=qsgd", "compression.down={codec: float16}"),
    ("privacy=record", "strategy=fedprox", *KEYED),
)


@pytest.mark.parametrize(
    "given",
    [*TWINS, *(pytest.param(g, marks=pytest.mark.nightly) for g in MORE)],
    ids=lambda g: "-".join(g[:2]),
)
def test_bits_and_bytes_are_those_of_the_simulation(given: tuple[str, ...], tmp_path: Path) -> None:
    """Residuals lie at the nodes, as all client states do."""
    check_twin(tmp_path, *SMALL, *given)


@pytest.mark.nightly
@pytest.mark.parametrize("entry", DEPLOYED, ids=lambda e: e.label)
def test_every_private_method_gives_the_bits_of_its_simulation(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keyed noise; those that are refused are told in docs/privacy.md."""
    monkeypatch.setenv("FEDSIM_ALLOW", "problems")
    strategy = compose_quickly(list(entry.arguments)).strategy
    nodes = {"strategy": strategy, "strategy.base": strategy.get("base")}
    weights = [
        f"{k}.weighting=uniform" for k, node in nodes.items() if node is not None and "weighting" in node
    ]
    model = ["model=mlp"] if entry.needs_head else []
    given = (*SMALL, *model, "client.steps=2", *entry.arguments, "privacy=client", *KEYED, *weights)
    try:
        simulated(*given)
    except ConfigError:
        pytest.skip("goes with no noise on sums")
    check_twin(tmp_path, *given)


def replaced(change: Any) -> Any:
    """Changes the frame of client 1 in round 1 on its way."""

    def alter(message: Any, content: Any) -> None:
        if asked(message) == (1, 1):
            record = content["outcome.update"]
            frame = record["=delta"].numpy().copy()
            content["outcome.update"] = ArrayRecord({"=delta": Array(change(frame))})

    return alter


def shorter(frame: Any) -> Any:
    return frame[:-1]


def other_codec(frame: Any) -> Any:
    frame[0] = 3
    return frame


def huge(frame: Any) -> Any:
    frame[4:8] = 255
    return frame


def as_numbers(frame: Any) -> Any:
    return frame.astype("float32")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (shorter, "bytes"),
        (huge, "entries; expected"),
        pytest.param(other_codec, "codec qsgd; expected top_k", marks=pytest.mark.nightly),
        pytest.param(as_numbers, "expected a frame", marks=pytest.mark.nightly),
    ],
)
def test_a_frame_that_no_encoder_makes_is_its_clients_failure(change: Any, why: str, tmp_path: Path) -> None:
    result, _ = deploy(
        tmp_path, *SMALL, "rounds=1", "clients_per_round=3", "compression=top_k", "failures.policy=skip",
        alter=replaced(change),
    )  # fmt: skip
    (row,) = result.rows
    assert [f["client"] for f in row["failures"]] == [1] and why in row["failures"][0]["reason"]


# -- masks --------------------------------------------------------------------------------------------------------

FOUR = (*SMALL, "rounds=1", "clients_per_round=4", "num_clients=4", "failures.policy=skip")


class Losing:
    """Breaks the process of ``clients`` when they are asked for ``task``."""

    def __init__(self, task: str, *clients: int):
        self.task, self.clients = task, clients

    def __call__(self, message: Any) -> Any:
        if "ask" not in message.content or message.content["broadcast"]["task"] != self.task:
            return None
        return Error(1, "gone") if message.content["ask"]["client"] in self.clients else None


def masked(folder: Path, task: str = "fit", *lost: int) -> Any:
    result, _ = deploy(folder, *FOUR, *MASKS, clients=4, spoil=Losing(task, *lost))
    assert not list(folder.rglob("masks.json")) or lost
    return result.rows[0]


def plain(*lost: int) -> Any:
    """A simulation whose sums are not masked."""
    given = [*FOUR, *RING, "engine=serial", "tracker=quiet"]
    return fedsim.simulate(given, strategy=hooked("fedavg", Fail(lost))).rows[0]


@pytest.mark.parametrize(
    ("task", "lost"),
    [
        ("fit", (1,)),
        pytest.param("secagg/shares", (2,), marks=pytest.mark.nightly),
        pytest.param("secagg/keys", (0,), marks=pytest.mark.nightly),
    ],
)
def test_masks_of_who_is_lost_are_taken_off(task: str, lost: tuple[int, ...], tmp_path: Path) -> None:
    """At least t = 3 of 4 come: the sum is that of the survivors, bit for bit."""
    row = masked(tmp_path, task, *lost)
    assert row["weights_hash"] == plain(*lost)["weights_hash"] and "secagg" not in row


def test_who_is_lost_after_its_update_counts(tmp_path: Path) -> None:
    assert masked(tmp_path, "secagg/unmask", 2)["weights_hash"] == plain()["weights_hash"]


@pytest.mark.parametrize("task", ["fit", pytest.param("secagg/unmask", marks=pytest.mark.nightly)])
def test_fewer_than_t_make_the_round_void(task: str, tmp_path: Path) -> None:
    row = masked(tmp_path, task, 0, 3)
    start = fedsim.simulate(
        [*FOUR, *MASKS, "engine=serial", "tracker=quiet"], strategy=hooked("fedavg", Fail(range(4)))
    )
    assert row["secagg"] == "void" and row["weights_hash"] == start.rows[0]["weights_hash"]


@pytest.mark.nightly
def test_no_residue_of_a_client_reaches_the_server_without_masks(tmp_path: Path) -> None:
    seen: dict[str, dict[int, bytes]] = {}
    for kind, given in (("ring", RING), ("masks", MASKS)):
        found = seen[kind] = {}

        def note(message: Any, content: Any, found: dict[int, bytes] = found) -> None:
            if "ask" in message.content and message.content["broadcast"]["task"] == "fit":
                found[message.content["ask"]["client"]] = (
                    content["outcome.update"]["=delta"].numpy()[8:].copy()
                )

        deploy(tmp_path / kind, *FOUR, *given, clients=4, alter=note)
    for client, open_one in seen["ring"].items():
        equal = (open_one.reshape(-1, 4) == seen["masks"][client].reshape(-1, 4)).all(1).mean()
        assert equal < 0.01


def test_weights_are_masked(tmp_path: Path) -> None:
    """The frame beside the update's is one residue, and no weight is told."""
    seen: dict[int, tuple[float, list[str], int]] = {}

    def note(message: Any, content: Any) -> None:
        if "ask" in message.content and message.content["broadcast"]["task"] == "fit":
            frame = content["outcome.update"]["=release/weight"].numpy()
            told = [*content["outcome"], *content.get("outcome.update.values", {})]
            seen[message.content["ask"]["client"]] = (content["outcome"]["weight"], told, len(frame))

    result, _ = deploy(tmp_path, *FOUR, *MASKS, clients=4, alter=note)
    assert {weight for weight, _, _ in seen.values()} == {1.0} and {n for _, _, n in seen.values()} == {12}
    assert result.rows[0]["weights_hash"] == plain()["weights_hash"]


def test_a_node_sends_nothing_unmasked(tmp_path: Path) -> None:
    """A server that leaves the legs out gets no update."""
    sites = []

    def spoil(message: Any) -> None:
        if "ask" in message.content and message.content["broadcast"]["task"] == "fit":
            record = message.content["ask.each:each"]
            for name in [k for k in record if "secagg" in k]:
                del record[name]
            sites.append(message)

    result, _ = deploy(tmp_path, *FOUR, *MASKS, clients=4, spoil=spoil)
    assert sites and all("without masks" in f["reason"] for f in result.rows[0]["failures"])
    assert result.rows[0]["secagg"] == "void"
