"""Messages and updates as Flower's records, and back. Payloads travel as they are: same names, types and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.payload import Outcome, Payload

Records = dict[str, ArrayRecord | MetricRecord | ConfigRecord]
Stamp = tuple[int, int]  # round and exchange in which a client's state was made


@dataclass(frozen=True)
class Ask:
    """One client's part in one exchange."""

    run: str  # of fedsim, not of Flower: it survives a restart of the ServerApp
    client: int
    round: int
    exchange: int  # number within the round
    task: str  # name of the client's method
    fold: tuple[str, ...]  # arrays that the update must hold
    state: Stamp | None  # the client's current state; None: it has none yet
    shared: Payload
    each: Payload | None = None


@dataclass(frozen=True)
class Answer:
    """What one client sent: its row of the log and, if it contributed, its update."""

    outcome: Outcome
    arrays: Mapping[str, Tensor]
    stateful: bool = False  # it made a new state, which lies at the node
    restarted: bool = False  # its state was gone: it began again from the initial one
    fatal: str = ""  # whatever the failure policy: the run must stop


def pack(payload: Payload) -> tuple[ArrayRecord, ConfigRecord]:
    """A payload as records; use the same records for all receivers, so that the link stores them once."""
    arrays = {k: Array(t.detach().cpu().contiguous().numpy()) for k, t in payload.arrays.items()}
    return ArrayRecord(arrays), ConfigRecord(dict(payload.values))


def _payload(content: RecordDict, name: str) -> Payload:
    """The payload back, validated like any other."""
    arrays = cast(ArrayRecord, content[name])
    return Payload.of({k: a.numpy() for k, a in arrays.items()}, config_of(content, f"{name}.values"))


def config_of(content: RecordDict, name: str) -> dict[str, Any]:
    """Plain values of a record."""
    return dict(cast(ConfigRecord, content[name]))


def ask_records(ask: Ask, shared: tuple[ArrayRecord, ConfigRecord]) -> RecordDict:
    """Content of the message to one client; ``shared`` are the packed records of ``ask.shared``."""
    about: dict[str, Any] = {
        "run": ask.run,
        "client": ask.client,
        "round": ask.round,
        "exchange": ask.exchange,
        "task": ask.task,
        "fold": list(ask.fold),
    }
    if ask.state is not None:
        about["state"] = list(ask.state)
    records: Records = {"ask": ConfigRecord(about)}
    records["shared"], records["shared.values"] = shared
    if ask.each is not None:
        records["each"], records["each.values"] = pack(ask.each)
    return RecordDict(records)


def read_ask(content: RecordDict) -> Ask:
    """The inverse of :func:`ask_records`."""
    about = config_of(content, "ask")
    return Ask(
        run=about["run"],
        client=about["client"],
        round=about["round"],
        exchange=about["exchange"],
        task=about["task"],
        fold=tuple(about["fold"]),
        state=tuple(about["state"]) if "state" in about else None,
        shared=_payload(content, "shared"),
        each=_payload(content, "each") if "each" in content else None,
    )


def answer_records(answer: Answer) -> RecordDict:
    """Content of a reply."""
    o = answer.outcome
    about: dict[str, Any] = {
        "client": o.client,
        "kind": o.kind,
        "weight": float(o.weight),
        "samples": int(o.samples),
        "bytes_down": int(o.bytes_down),
        "seconds": float(o.seconds),
        "stateful": answer.stateful,
        "restarted": answer.restarted,
    }
    for name, text in (("reason", o.reason), ("fatal", answer.fatal)):
        if text:
            about[name] = text
    records: Records = {"outcome": ConfigRecord(about)}
    records["update"], records["update.values"] = pack(Payload(answer.arrays, o.values))
    records["metrics"] = MetricRecord({k: float(v) for k, v in o.metrics.items()})
    return RecordDict(records)


def read_answer(content: RecordDict) -> Answer:
    """The inverse of :func:`answer_records`; ``bytes_up`` is counted here, from what arrived."""
    about, update = config_of(content, "outcome"), _payload(content, "update")
    outcome = Outcome(
        client=about["client"],
        kind=about["kind"],
        weight=about["weight"],
        values=update.values,
        metrics=dict(cast(Mapping[str, float], content["metrics"])),
        bytes_down=about["bytes_down"],
        bytes_up=update.nbytes,
        samples=about["samples"],
        seconds=about["seconds"],
        reason=about.get("reason", ""),
    )
    return Answer(outcome, update.arrays, about["stateful"], about["restarted"], fatal=about.get("fatal", ""))


def stamp_state(stamp: Stamp) -> dict[str, Tensor]:
    """What the server keeps in place of a client's state: where the real one stands."""
    return {"stamp": torch.tensor(stamp)}


def read_stamp(state: Mapping[str, Tensor]) -> Stamp | None:
    """The inverse of :func:`stamp_state`; None of an empty state."""
    if not state:
        return None
    round, exchange = state["stamp"].tolist()
    return round, exchange


def absent(client: int, kind: str, reason: str) -> Answer:
    """The answer of a client that sent none."""
    return Answer(Outcome(client, kind, reason=reason), {})


def failed(answer: Answer, reason: str) -> Answer:
    """The same answer, made unusable."""
    return replace(answer, outcome=replace(answer.outcome, kind="failed", reason=reason), arrays={})
