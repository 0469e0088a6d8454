"""Messages and updates as Flower's records, and back. Payloads travel as they are, same names, types and bytes; only
the padding of flat vectors stays behind.

A message is one client's part of an exchange: all that ``Broadcast`` and ``Chunk`` hold for it, field by field, so that
what is added to them travels too. Only client states do not: their stamp does.

A plain value stands in the record of its message. A payload is a record of arrays under its own name and one of plain
values, ``<name>.values``; a letter before an array's name says how it was packed. Whether a field of a chunk holds
something of each client's own (``each``) or arrays with a row per client (``row``) is said by the field itself (see
``Chunk``), and travels as a tag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.engine.assignments import BY_ROW, Broadcast, Chunk
from fedsim.errors import EngineError
from fedsim.exchange.packing import pack, sent_bytes, unpack
from fedsim.exchange.payload import Outcome, Payload
from fedsim.task.layout import Layout

Records = dict[str, ArrayRecord | MetricRecord | ConfigRecord]
Stamp = tuple[int, int]  # round and exchange in which a client's state was made
WIRE = 4  # of this format: both sides must speak the same
AS_IS = "="  # before the name of an array that is not packed
Plain = bool | int | float | str


@dataclass(frozen=True)
class Ask:
    """One client's part in one exchange, as its node receives it."""

    run: str  # of fedsim, not of Flower: it survives a restart of the ServerApp
    exchange: int  # number within the round
    state: Stamp | None  # the client's current state; None: it has none yet
    broadcast: Broadcast  # its fold names the arrays to send; how they are folded is the server's affair
    chunk: Chunk  # of this one client, without states
    held: str = ""  # content of what the broadcast relies on, if that did not come along

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
    lacks: bool = False  # nothing was done: what the message relies on is not there


def shared_records(broadcast: Broadcast, layout: Layout, held: str = "") -> Records:
    """What all clients of an exchange receive; use the same records for all, so that the link stores them once.

    ``held`` is the content of the standing part if only that is to travel, as to clients that have it.
    """
    plain: dict[str, Any] = {"fold": list(broadcast.fold)}
    if held:
        plain["held"], broadcast = held, replace(broadcast, standing=None)
    records: Records = {}
    for f in _fields(broadcast, but=("fold",)):
        _put(records, plain, f.name, getattr(broadcast, f.name), f"Broadcast.{f.name}", layout)
    return {"broadcast": ConfigRecord(plain), **{f"broadcast.{k}": v for k, v in records.items()}}


def ask_records(
    shared: Records, chunk: Chunk, client: int, run: str, exchange: int, layout: Layout
) -> RecordDict:
    """Content of the message to one ``client`` of ``chunk``."""
    plain: dict[str, Any] = {"run": run, "exchange": exchange, "client": client}
    if (stamp := read_stamp(chunk.states.get(client, {}))) is not None:
        plain["state"] = list(stamp)
    records: Records = {}
    at = chunk.clients.index(client)
    for f in _fields(chunk, but=("clients", "states")):
        value, what = getattr(chunk, f.name), f"Chunk.{f.name}"
        if f.metadata == BY_ROW and value:
            mine = Payload({k: t[at : at + 1] for k, t in value.items()})
            _put(records, plain, f"row:{f.name}", mine, what, layout)
        elif f.metadata != BY_ROW and client in value:
            _put(records, plain, f"each:{f.name}", value[client], what, layout)
    return RecordDict({**shared, "ask": ConfigRecord(plain), **{f"ask.{k}": v for k, v in records.items()}})


def asked(content: RecordDict) -> int:
    """The client that a message is for."""
    return int(config_of(content, "ask")["client"])


def read_ask(content: RecordDict, layout: Layout) -> Ask:
    """The inverse of :func:`ask_records`."""
    about, client = _taken(content, "ask", layout), asked(content)
    parts = _taken(content, "broadcast", layout)
    held = parts.pop("held", "")
    broadcast = Broadcast(**{**parts, "fold": dict.fromkeys(parts["fold"], ("stack",))})
    own: dict[str, Any] = {}
    for name, value in about.items():
        kind, _, key = name.partition(":")
        if kind == "each":
            own[key] = {client: value}
        elif kind == "row":
            own[key] = value.arrays
    state = tuple(about["state"]) if "state" in about else None
    chunk = Chunk([client], **own)
    return Ask(about["run"], about["exchange"], cast(Stamp | None, state), broadcast, chunk, held)


def answer_records(answer: NodeAnswer, layout: Layout | None) -> RecordDict:
    """Content of a reply; ``layout`` is needed for one that holds arrays."""
    o, plain = answer.outcome, dict[str, Any]()
    records: Records = {}
    for f in _fields(o, but=("values", "metrics", "error", "guesses")):
        _put(records, plain, f.name, getattr(o, f.name), f"Outcome.{f.name}", layout)
    flags = {"stateful": answer.stateful, "restarted": answer.restarted, "lacks": answer.lacks}
    _put(records, plain, "fatal", answer.fatal, "fatal", layout)
    _put(records, plain, "update", Payload(answer.arrays, o.values), "update", layout)
    metrics: dict[str, Any] = dict(o.metrics)
    for name, value in metrics.items():
        metrics[name] = [float(x) for x in value] if isinstance(value, list | tuple) else float(value)
    whole: Records = {"outcome": ConfigRecord(plain), "flags": ConfigRecord(dict(flags))}
    whole["metrics"] = MetricRecord(metrics)
    return RecordDict({**whole, **{f"outcome.{k}": v for k, v in records.items()}})


def read_answer(content: RecordDict, layout: Layout) -> NodeAnswer:
    """The inverse of :func:`answer_records`; ``bytes_up`` is counted here, from what arrived."""
    about, flags = _taken(content, "outcome", layout), config_of(content, "flags")
    update, fatal = about.pop("update"), about.pop("fatal", "")
    metrics = dict(cast(Mapping[str, Any], content["metrics"]))
    about |= {"values": update.values, "metrics": metrics, "bytes_up": sent_bytes(update, layout)}
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


def _fields(thing: Any, but: tuple[str, ...]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(thing) if f.name not in but]


def _put(
    records: Records, plain: dict[str, Any], name: str, value: Any, what: str, layout: Layout | None
) -> None:
    """``value`` under ``name``: a payload as records, a plain one among ``plain``; None and "" are left out."""
    if isinstance(value, Payload):
        arrays, packed = pack(value.arrays, layout)
        held = {
            packed.get(k, AS_IS) + k: Array(t.detach().cpu().contiguous().numpy()) for k, t in arrays.items()
        }
        records[name], records[f"{name}.values"] = ArrayRecord(held), ConfigRecord(dict(value.values))
    elif isinstance(value, Plain):
        if value != "":
            plain[name] = value
    elif value is not None:
        raise EngineError(
            f"{what}: {type(value).__name__} cannot travel to a node; a payload or plain value can"
        )


def _taken(content: RecordDict, name: str, layout: Layout) -> dict[str, Any]:
    """What :func:`_put` put into the records of that name; payloads are validated like any other."""
    out = config_of(content, name)
    for key, record in content.items():
        inner = key.removeprefix(f"{name}.")
        if key != inner and isinstance(record, ArrayRecord):
            found = Payload.of(
                {k[1:]: a.numpy() for k, a in record.items()}, config_of(content, f"{key}.values")
            )
            packed = {k[1:]: k[:1] for k in record if k[:1] != AS_IS}
            out[inner] = Payload(unpack(found.arrays, packed, layout), found.values)
    return out
