"""Long vectors in parts: the same bits as in one piece, padding left out, and nothing believed of what arrives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node
from real import hashes

import fedsim
from fedsim.errors import ClientError
from fedsim.exchange.payload import Outcome
from fedsim.flower import asking, longvectors
from fedsim.flower.answers import NodeAnswer, ReplyTo, answer_records, read_answer
from fedsim.flower.longvectors import arrived, in_parts, is_long
from fedsim.task.layout import Layout
from fedsim.task.rehearsal import rehearsed

LAYOUT = Layout(
    nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
)  # 35, 5, 15 and 3 numbers, from multiples of 16 on
W = LAYOUT.expand(torch.arange(1.0, 59.0))
TO = ReplyTo("run", 0, 0, 0)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longvectors, "PART", 40)  # bytes: 10 numbers


def record(*keys: str) -> dict[str, Any]:
    """Parts of ``W`` as they travel, those under ``keys`` or all."""
    found = in_parts("ww", "w", W, LAYOUT.params)
    return {k: v for k, v in found.items() if not keys or k in keys}


@pytest.mark.usefixtures("_small")
def test_a_vector_in_parts_is_the_vector() -> None:
    found = record()
    assert list(found) == ["ww", *(f"+{n:05d}w" for n in range(1, 6))]
    assert [a.shape for a in found.values()] == [(10,)] * 5 + [(8,)]
    assert all(a.data == Array(a.numpy()).data for a in found.values())  # as Flower makes them itself
    (one,) = arrived(found)
    assert (one.name, one.kind, one.shape, one.dtype) == ("w", "w", (58,), torch.float32)
    assert not found  # who takes a part can let it go
    assert torch.equal(one.whole(LAYOUT.params), W)
    (plain,) = arrived(in_parts("=v", "v", W, None))
    assert torch.equal(plain.whole(None), W)
    (none,) = arrived(in_parts("=v", "v", W[:0], None))
    assert none.shape == (0,) and not len(none.whole(None))


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8, torch.bool, torch.complex64])
def test_every_type_can_travel_in_parts(dtype: torch.dtype) -> None:
    vector = (torch.arange(101) % 7).to(dtype)
    assert is_long(vector) and not is_long(vector.view(1, -1))
    (one,) = arrived(in_parts("=v", "v", vector, None))
    assert torch.equal(one.whole(None), vector)


@pytest.mark.usefixtures("_small")
def test_an_update_in_parts_beside_others_arrives_in_order() -> None:
    arrays = {"a": torch.ones(2, 3), "w": W, "g": torch.arange(40.0), "b": torch.tensor(1.0)}
    answer = NodeAnswer(Outcome(0, "ok", 1.0), arrays)
    back = read_answer(answer_records(answer, LAYOUT, TO), LAYOUT)
    assert list(back.arrays) == list(arrays)
    assert all(torch.equal(a, b) for a, b in zip(back.arrays.values(), arrays.values(), strict=True))
    assert back.outcome.bytes_up == 4 * (6 + 58 + 40 + 1)


def another(key: str, array: np.ndarray) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update({key: Array(array)})


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("+00002w"), "part 3 follows none"),
        (lambda found: found.pop("ww"), "part 1 follows none"),
        (another("+00006w", np.ones((2, 2), np.float32)), "part 6 is float32"),
        (another("+00006w", np.ones(2)), "part 6 is float64"),
        (another("+00006w", np.ones(2, np.float32)), r"\(60,\) is no packed vector of kind 'w'"),
        (another("+00000w", np.ones(2, np.float32)), "no name, or twice the same"),
        (another("+1w", np.ones(2, np.float32)), "no name, or twice the same"),
        (another("+00001", np.ones(2, np.float32)), "no name, or twice the same"),
        (another("+00001gamma", np.ones(2, np.float32)), "array 'gamma': part 1 follows none"),
        (another("=w", np.ones(2, np.float32)), "no name, or twice the same"),
    ],
)
def test_parts_that_are_none_are_refused(change: Callable[[dict[str, Any]], None], said: str) -> None:
    content = answer_records(NodeAnswer(Outcome(0, "ok", 1.0), {"w": W}), LAYOUT, TO)
    found = dict(content["outcome.update"])
    change(found)
    content = RecordDict({**content, "outcome.update": ArrayRecord(found)})
    with pytest.raises(ClientError, match=said):
        read_answer(content, LAYOUT)


TINY = ("model=mlp", "rounds=2", "client.epochs=1")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_deployment_in_parts_whose_answers_are_pulled_one_by_one_has_the_simulations_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.task.room.LARGE", 0)
    held: list[int] = []
    hear = asking.GridExchange._hear

    def watched(self: Any, client: int, answer: NodeAnswer) -> None:
        hear(self, client, answer)
        held.append(len(self._done))

    monkeypatch.setattr(asking.GridExchange, "_hear", watched)
    settings = (*TINY, f"strategy={method}", "clients_per_round=3")
    deploy(tmp_path, *settings)
    alone = fedsim.simulate(["engine=serial", "tracker=quiet", "num_clients=3", *settings])
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    assert max(held) == 1  # the one that is waited for


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("buffers", ["average", "local"])
def test_what_spares_memory_where_models_are_large_keeps_the_bits(
    buffers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes train the model itself, build it for each message and rehearse it once; the server empties its own."""
    monkeypatch.setattr("fedsim.task.room.LARGE", 0)
    monkeypatch.setattr("fedsim.flower.site.LARGE", 0)
    monkeypatch.setattr("fedsim.flower.site._built", {})
    rehearsals: list[str] = []
    monkeypatch.setattr(
        "fedsim.flower.habitsfile.rehearsed", lambda *about: rehearsals.append("node") or rehearsed(*about)
    )
    settings = (*TINY, "strategy=scaffold", "clients_per_round=3", "model.batch_norm=true")
    own = (
        *settings,
        "data=digits",
        f"buffers={buffers}",
        "evaluation.clients_every=1",
        "evaluation.holdout=0.2",
    )
    twin, _ = deploy(tmp_path, *own)
    alone = fedsim.simulate(["engine=serial", "tracker=quiet", "num_clients=3", *own])
    for key in ("weights_hash", "loss", "clients/loss", "train_loss"):
        assert [r.get(key) for r in twin.rows] == [r.get(key) for r in alone.rows], key
    assert len(rehearsals) == 3  # one a node
    weights = [load_file(run.dir / "weights.safetensors") for run in (twin, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_model_with_batchnorm_deploys_with_the_simulations_bits(tmp_path: Path) -> None:
    settings = (*TINY, "model.batch_norm=true", "clients_per_round=3", "data=digits")
    for buffers in ("average", "local"):
        own = (*settings, f"buffers={buffers}")
        deploy(tmp_path / buffers, *own)
        alone = fedsim.simulate(["engine=serial", "tracker=quiet", "num_clients=3", *own])
        assert hashes(tmp_path / buffers / "run") == [r["weights_hash"] for r in alone.rows]


def test_a_node_may_be_several_clients(tmp_path: Path) -> None:
    both = node(tmp_path, 0)
    del both["partition-id"]
    nodes = {100: {**both, "clients": "0 2"}, 101: node(tmp_path, 1)}
    settings = (*TINY, "strategy=scaffold", "clients_per_round=3")
    _, grid = deploy(tmp_path, *settings, nodes=nodes)
    alone = fedsim.simulate(["engine=serial", "tracker=quiet", "num_clients=3", *settings])
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    served = {(at, ask["client"]) for at, kind, ask in grid.log if kind == "train"}
    assert served == {(100, 0), (101, 1), (100, 2)}
    kept = next(p for p in (tmp_path / "state-0").iterdir() if p.name not in ("nodes", "cache"))
    assert sorted(p.name for p in kept.iterdir()) == ["client-0", "client-2"]
