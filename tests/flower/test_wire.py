"""Payloads through Flower's records: every type, the same bytes, and how much the wire adds to what is counted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy
from real import hashes

import fedsim
from fedsim.data.sources import heart_disease
from fedsim.engine.assignments import BY_ROW, Broadcast, Chunk
from fedsim.errors import ClientError, ConfigError, EngineError
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import Outcome, Payload
from fedsim.flower import wire
from fedsim.flower.answers import NodeAnswer, ReplyTo, answer_records, read_answer
from fedsim.flower.wire import (
    ask_records,
    read_ask,
    shared_records,
    stamp_state,
)
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout

HEART = Path(__file__).parents[3] / "shared/data/heart_disease"
DTYPES = ["float16", "float32", "float64", "complex64", "bool", "uint8", "int8", "int16", "int32", "int64"]


TO = ReplyTo("run", 4, 1, 2)
LAYOUT = Layout(nn.Linear(3, 2))  # 6 and 2 numbers, from 0 and 16 on, in 32


def over_the_wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(
        type(recorddict_to_proto(content)).FromString(recorddict_to_proto(content).SerializeToString())
    )


def everything() -> Payload:
    arrays = {f"a/{d}": (torch.arange(6).view(2, 3) - 1).to(getattr(torch, d)) for d in DTYPES}
    arrays |= {
        "scalar.0d": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(6.0).view(2, 3).T,
    }
    arrays |= {"nan": torch.tensor([float("nan"), float("inf"), -0.0])}
    values: dict[str, Any] = {
        "yes": True,
        "n": -(2**63),
        "big": 2**63 - 1,
        "f": 0.1,
        "s": "naïve",
        "b": b"\x00\xff",
    }
    return Payload.of(arrays, values | {"is": [1, 2], "fs": [0.5], "ss": ["a", ""], "none": []})


def equal(a: Payload, b: Payload) -> bool:
    return a.values == b.values and list(a.arrays) == list(b.arrays) and all(
        x.dtype == y.dtype and x.shape == y.shape and hash_tensors([x]) == hash_tensors([y])
        for x, y in zip(a.arrays.values(), b.arrays.values(), strict=True)
    )  # fmt: skip


def test_every_type_of_payload_arrives_as_it_was_sent() -> None:
    sent = everything()
    for each, state in (({}, {}), ({2: sent, 7: Payload()}, {2: stamp_state((3, 1))})):
        shared = shared_records(
            Broadcast(4, "fit", sent, {"delta": ("mean", "sum"), "g": ("stack",)}), LAYOUT
        )
        got = read_ask(
            over_the_wire(ask_records(shared, Chunk([2, 7], each, state), 2, "run", 1, LAYOUT)), LAYOUT
        )
        assert (got.run, got.client, got.broadcast.round, got.exchange, got.broadcast.task) == (
            "run",
            2,
            4,
            1,
            "fit",
        )
        assert got.address == TO
        assert list(got.broadcast.fold) == ["delta", "g"]
        assert got.state == ((3, 1) if state else None)
        assert equal(got.broadcast.payload, sent)
        assert list(got.chunk.each) == ([2] if each else [])
        assert not each or equal(got.chunk.each[2], sent)

    outcome = Outcome(2, "ok", 3.0, sent.values, {"loss": float("nan")}, 10, 0, 7, 0.5)
    back = read_answer(
        over_the_wire(answer_records(NodeAnswer(outcome, sent.arrays, stateful=True), LAYOUT, TO)), LAYOUT
    )
    assert equal(Payload(back.arrays, back.outcome.values), sent)
    assert (back.stateful, back.restarted, back.lost) == (True, False, False)
    assert back.outcome.bytes_up == sent.nbytes
    assert back.outcome.metrics["loss"] != back.outcome.metrics["loss"]


@dataclass(frozen=True)
class MoreBroadcast(Broadcast):
    extra: Payload | None = None
    level: float | None = None


@dataclass(frozen=True)
class MoreChunk(Chunk):
    odd: Mapping[int, object] = field(default_factory=dict)
    further: Mapping[str, torch.Tensor] = field(default_factory=dict, metadata=BY_ROW)


def test_what_is_added_to_messages_travels_without_a_line_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "Broadcast", MoreBroadcast)
    monkeypatch.setattr(wire, "Chunk", MoreChunk)
    extra = Payload.of({"x": torch.ones(3)})
    shared = shared_records(MoreBroadcast(0, "fit", Payload(), {}, extra=extra, level=0.5), LAYOUT)
    chunk = MoreChunk(
        [4, 6], rows={"w": torch.arange(6.0).view(2, 3)}, turns={4: 1, 6: 9}, further={"7": torch.eye(2)}
    )
    got: Any = read_ask(over_the_wire(ask_records(shared, chunk, 6, "run", 0, LAYOUT)), LAYOUT)
    assert torch.equal(got.broadcast.extra.arrays["x"], torch.ones(3))
    assert got.broadcast.level == 0.5
    assert got.chunk.turns == {6: 9}
    assert got.chunk.rows["w"].tolist() == [[3.0, 4.0, 5.0]]
    assert got.chunk.further["7"].tolist() == [[0.0, 1.0]]
    with pytest.raises(EngineError, match=r"Chunk\.odd: set cannot travel"):
        ask_records(shared, MoreChunk([4], odd={4: {1}}), 4, "run", 0, LAYOUT)


def test_what_a_message_stands_on_travels_whole_or_by_name() -> None:
    stands = Broadcast(0, "fit", Payload(), {}, everything(), keep=True)
    whole, named = (read_ask(over_the_wire(ask_records(r, Chunk([4]), 4, "run", 0, LAYOUT)), LAYOUT) for r in (
        shared_records(stands, LAYOUT), shared_records(stands, LAYOUT, "5ca1ab1e")
    ))  # fmt: skip
    assert whole.broadcast.standing is not None
    assert equal(whole.broadcast.standing, everything())
    assert (whole.held, named.held) == ("", "5ca1ab1e")
    assert named.broadcast.standing is None
    assert whole.broadcast.keep and named.broadcast.keep
    lacks = read_answer(
        over_the_wire(answer_records(NodeAnswer(Outcome(4, "failed"), lacks=True), None, TO)),
        LAYOUT,
    )
    assert lacks.lacks


def flat(*rows: float) -> torch.Tensor:
    """Vectors of ``LAYOUT``, one a number, its entries counted on from there."""
    stack = LAYOUT.expand(torch.stack([torch.arange(8.0) + r for r in rows]))
    return stack if len(rows) > 1 else stack[0]


def test_padding_does_not_travel_and_is_there_again() -> None:
    spoilt = flat(1.0)
    spoilt[-1] = 0.5
    sent = Payload.of({"w": flat(1.0), "stack": flat(1.0, 2.0), "spoilt": spoilt, "small": torch.ones(8)})
    assert sent_bytes(sent, LAYOUT) == 4 * (8 + 16 + 32 + 8) == sent.nbytes - 4 * (24 + 48)
    chunk = Chunk([3, 5], {5: sent}, rows={"w": flat(3.0, 4.0)})
    records = ask_records(shared_records(Broadcast(0, "fit", sent, {}), LAYOUT), chunk, 5, "run", 0, LAYOUT)
    lengths = {
        k: [a.numpy().shape[-1] for a in r.values()] for k, r in records.items() if "Array" in str(type(r))
    }
    assert lengths == {
        "broadcast.payload": [8, 8, 32, 8], "ask.each:each": [8, 8, 32, 8], "ask.row:rows": [8]
    }  # fmt: skip
    got = read_ask(over_the_wire(records), LAYOUT)
    assert equal(got.broadcast.payload, sent) and equal(got.chunk.each[5], sent)
    assert torch.equal(got.chunk.rows["w"], flat(3.0, 4.0)[1:])
    answer = NodeAnswer(Outcome(5, "ok", 1.0), {"delta": -flat(1.0)})  # its padding is -0.0
    back = read_answer(over_the_wire(answer_records(answer, LAYOUT, TO)), LAYOUT)
    assert torch.equal(back.arrays["delta"], -flat(1.0)) and back.outcome.bytes_up == 32


def test_what_another_layout_packed_is_refused_by_name() -> None:
    answer = answer_records(NodeAnswer(Outcome(5, "ok", 1.0), {"delta": flat(1.0)}), LAYOUT, TO)
    with pytest.raises(
        ClientError, match=r"array 'delta': \(8,\) is no packed vector of kind 'w'; expected \(\.\.\., 10\)"
    ):
        read_answer(over_the_wire(answer), Layout(nn.Linear(4, 2)))


def test_a_whole_number_that_no_wire_carries_is_refused_in_a_simulation_too() -> None:
    for value in (2**63, -(2**63) - 1, [0, 2**63]):
        with pytest.raises(ClientError, match=r"value 'n': .* needs more than 64 bits"):
            Payload.of({}, {"n": value})


def test_the_wire_adds_a_few_kilobytes_to_what_is_counted(tmp_path: Path) -> None:
    """Counted bytes are those of the simulation (see ``test_local``); here they are compared with the wire's."""
    settings = ("rounds=2", "clients_per_round=3", "strategy=scaffold", "model=mlp", "client.epochs=1")
    run, grid = deploy(tmp_path, *settings)
    messages = 2 * 3
    for counted, measured in (("bytes_down", grid.bytes_down), ("bytes_up", grid.bytes_up)):
        payload = sum(row[counted] for row in run.rows)
        assert payload > 500_000
        assert 0 <= measured - payload < 2_000 * messages


def own_nodes(folder: Path, hospitals: list[str]) -> dict[int, dict[str, Any]]:
    """A node per hospital, whose file holds its own patients only."""
    head, *lines = (HEART / "heart_disease.csv").read_text().splitlines()
    column = head.split(",").index("hospital")
    nodes = {}
    for k, name in enumerate(hospitals):
        mine = folder / f"{name}.csv"
        mine.write_text(
            "\n".join([head, *(line for line in lines if line.split(",")[column] == name)]) + "\n"
        )
        nodes[10 + k] = {
            "partition-id": k,
            "state-dir": str(folder / f"s{k}"),
            "data-path": str(mine),
            "own-data": True,
        }
    return nodes


@pytest.mark.skipif(not HEART.exists(), reason="../shared/data/heart_disease is not there")
def test_nodes_with_their_own_data_give_the_bits_of_clients_handed_over(tmp_path: Path) -> None:
    text = (HEART / "heart_disease.csv").read_text().splitlines()
    column = text[0].split(",").index("hospital")
    hospitals = sorted({line.split(",")[column] for line in text[1:]})[:2]
    nodes = own_nodes(tmp_path, hospitals)
    settings = (
        "strategy=fedspeed",
        "rounds=3",
        "clients_per_round=2",
        "model=linear",
        "evaluation.holdout=0.2",
    )
    settings += ("evaluation.clients_every=1",)
    source = ("data=heart_disease", f"data.path={HEART}", "data.missing=drop")
    deploy(tmp_path, *settings, *source, clients=2, nodes=nodes)
    parts = [heart_disease(node["data-path"], missing="drop").train for node in nodes.values()]
    server = heart_disease(HEART, missing="drop").test
    assert server is not None
    alone = fedsim.simulate(
        ["engine=serial", "tracker=quiet", *settings],
        clients=[(part.x, part.y) for part in parts],
        test=(server.x, server.y),
    )
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]

    del nodes[11]["own-data"]
    with pytest.raises(ConfigError, match=r"clients \[0\] have own-data, the others do not"):
        deploy(tmp_path / "mixed", *settings, *source, clients=2, nodes=nodes)


def test_a_client_that_writes_into_what_it_was_lent_is_that_clients_failure(tmp_path: Path) -> None:
    """In a simulation it ends the run, since others share that memory; here nobody does."""
    settings = ("strategy._target_=careless.Careless", "rounds=1", "clients_per_round=1")
    said = "its message is read-only, but 'w' was written to"
    run, _ = deploy(tmp_path / "a", *settings, "failures.policy=skip")
    assert [said in f["reason"] for f in run.rows[0]["failures"]] == [True]
    with pytest.raises(ClientError, match=said):
        deploy(tmp_path / "b", *settings)
