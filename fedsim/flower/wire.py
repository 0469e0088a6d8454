"""Messages and updates as Flower's records, and back. Payloads travel as they are: same names, types and bytes.

A message is one client's part of an exchange: all that ``Broadcast`` and ``Chunk`` hold for it, field by field, so that
what is added to them travels too. Only client states do not: their stamp does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.engine.assignments import Broadcast, Chunk
from fedsim.errors import EngineError
from fedsim.exchange.payload import Outcome, Payload

Records = dict[str, ArrayRecord | MetricRecord | ConfigRecord]
Stamp = tuple[int, int]  # round and exchange in which a client's state was made
WIRE = 2  # of this format: both sides must speak the same
Plain = bool | int | float | str


@dataclass(frozen=True)
class Ask:
    """One client's part in one exchange, as its node receives it."""

    run: str  # of fedsim, not of Flower: it survives a restart of the ServerApp
    exchange: int  # number within the round
    state: Stamp | None  # the client's current state; None: it has none yet
    broadcast: Broadcast  # its fold names the arrays to send; how they are folded is the server's affair
    chunk: Chunk  # of this one client, without states
    held: str = ""  # content of what the broadcast stands on, if that did not come along

    @property
    def client(self) -> int:
        """Who is asked."""
        return self.chunk.clients[0]


@dataclass(frozen=True)
class NodeAnswer:
    """What one client sent: its row of the log and, if it contributed, its update."""

    outcome: Outcome
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    stateful: bool = False  # it made a new state, which lies at the node
    restarted: bool = False  # its state was gone: it began again from the initial one
    fatal: str = ""  # whatever the failure policy: the run must stop
    lacks: bool = False  # nothing was done: what the message stands on is not there


def shared_records(broadcast: Broadcast, held: str = "") -> Records:
    """What all clients of an exchange receive; use the same records for all, so that the link stores them once.

    ``held`` is the content of the standing part if only that is to travel, as to clients that have it.
    """
    plain: dict[str, Any] = {"fold": list(broadcast.fold)}
    if held:
        plain["held"], broadcast = held, replace(broadcast, standing=None)
    records: Records = {}
    for name, value in _fields(broadcast, but=("fold",)):
        _put(records, plain, name, value, f"Broadcast.{name}")
    return {"broadcast": ConfigRecord(plain), **{f"broadcast.{k}": v for k, v in records.items()}}


def ask_records(shared: Records, chunk: Chunk, client: int, run: str, exchange: int) -> RecordDict:
    """Content of the message to one ``client`` of ``chunk``."""
    plain: dict[str, Any] = {"run": run, "exchange": exchange, "client": client}
    if (stamp := read_stamp(chunk.states.get(client, {}))) is not None:
        plain["state"] = list(stamp)
    records: Records = {}
    for name, value in _fields(chunk, but=("clients", "states")):
        if value and all(isinstance(k, str) for k in value):  # arrays with a row for each client
            at = chunk.clients.index(client)
            _put(records, plain, f"rows:{name}", Payload({k: t[at : at + 1] for k, t in value.items()}), name)
        elif client in value:
            _put(records, plain, f"each:{name}", value[client], f"Chunk.{name}")
    return RecordDict({**shared, "ask": ConfigRecord(plain), **{f"ask.{k}": v for k, v in records.items()}})


def read_ask(content: RecordDict) -> Ask:
    """The inverse of :func:`ask_records`."""
    about, client = _taken(content, "ask"), int(config_of(content, "ask")["client"])
    parts = _taken(content, "broadcast")
    held = parts.pop("held", "")
    broadcast = Broadcast(**{**parts, "fold": dict.fromkeys(parts["fold"], ("stack",))})
    own: dict[str, Any] = {}
    for name, value in about.items():
        kind, _, key = name.partition(":")
        if kind == "each":
            own[key] = {client: value}
        elif kind == "rows":
            own[key] = value.arrays
    state = tuple(about["state"]) if "state" in about else None
    chunk = Chunk([client], **own)
    return Ask(about["run"], about["exchange"], cast(Stamp | None, state), broadcast, chunk, held)


def answer_records(answer: NodeAnswer) -> RecordDict:
    """Content of a reply."""
    o, plain = answer.outcome, dict[str, Any]()
    records: Records = {}
    for name, value in _fields(o, but=("values", "metrics")):
        _put(records, plain, name, value, f"Outcome.{name}")
    flags = {"stateful": answer.stateful, "restarted": answer.restarted, "lacks": answer.lacks}
    _put(records, plain, "fatal", answer.fatal, "fatal")
    _put(records, plain, "update", Payload(answer.arrays, o.values), "update")
    metrics: dict[str, Any] = dict(o.metrics)
    for name, value in metrics.items():
        metrics[name] = [float(x) for x in value] if isinstance(value, list | tuple) else float(value)
    whole: Records = {"outcome": ConfigRecord(plain), "flags": ConfigRecord(dict(flags))}
    whole["metrics"] = MetricRecord(metrics)
    return RecordDict({**whole, **{f"outcome.{k}": v for k, v in records.items()}})


def read_answer(content: RecordDict) -> NodeAnswer:
    """The inverse of :func:`answer_records`; ``bytes_up`` is counted here, from what arrived."""
    about, flags = _taken(content, "outcome"), config_of(content, "flags")
    update, fatal = about.pop("update"), about.pop("fatal", "")
    metrics = dict(cast(Mapping[str, Any], content["metrics"]))
    about |= {"values": update.values, "metrics": metrics, "bytes_up": update.nbytes}
    return NodeAnswer(Outcome(**about), update.arrays, **flags, fatal=fatal)


def config_of(content: RecordDict, name: str) -> dict[str, Any]:
    """Plain values of a record."""
    return dict(cast(ConfigRecord, content[name]))


def stamp_state(stamp: Stamp) -> dict[str, Tensor]:
    """What the server keeps in place of a client's state: where the real one stands."""
    return {"stamp": torch.tensor(stamp)}


def read_stamp(state: Mapping[str, Tensor]) -> Stamp | None:
    """The inverse of :func:`stamp_state`; None of an empty state."""
    if not state:
        return None
    round, exchange = state["stamp"].tolist()
    return round, exchange


def absent(client: int, kind: str, reason: str) -> NodeAnswer:
    """The answer of a client that sent none."""
    return NodeAnswer(Outcome(client, kind, reason=reason))


def failed(answer: NodeAnswer, reason: str) -> NodeAnswer:
    """The same answer, made unusable."""
    return replace(answer, outcome=replace(answer.outcome, kind="failed", reason=reason), arrays={})


def _fields(thing: Any, but: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(f.name, getattr(thing, f.name)) for f in dataclasses.fields(thing) if f.name not in but]


def _put(records: Records, plain: dict[str, Any], name: str, value: Any, what: str) -> None:
    """``value`` under ``name``: a payload as two records, a plain one among ``plain``; None and "" are left out."""
    if isinstance(value, Payload):
        arrays = {k: Array(t.detach().cpu().contiguous().numpy()) for k, t in value.arrays.items()}
        records[name], records[f"{name}.values"] = ArrayRecord(arrays), ConfigRecord(dict(value.values))
    elif isinstance(value, Plain):
        if value != "":
            plain[name] = value
    elif value is not None:
        raise EngineError(
            f"{what}: {type(value).__name__} cannot travel to a node; a payload or plain value can"
        )


def _taken(content: RecordDict, name: str) -> dict[str, Any]:
    """What :func:`_put` put into the records of that name; payloads are validated like any other."""
    out = config_of(content, name)
    for key in list(content):
        inner = key.removeprefix(f"{name}.")
        if key != inner and not inner.endswith(".values"):
            arrays = cast(ArrayRecord, content[key])
            out[inner] = Payload.of(
                {k: a.numpy() for k, a in arrays.items()}, config_of(content, f"{key}.values")
            )
    return out
