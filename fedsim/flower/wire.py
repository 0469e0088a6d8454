"""Messages as Flower's records, and back. Payloads travel as they are, same names, types and bytes; only the padding
of flat vectors stays behind. Answers: ``fedsim.flower.answers``.

A message is one client's part of an exchange: all that ``Broadcast`` and ``Chunk`` hold for it, field by field, so that
what is added to them travels too. Only client states do not: their stamp does.

How values and payloads are laid out is said in ``fedsim.flower.records``. Whether a field of a chunk holds something of
each client's own (``each``) or arrays with a row per client (``row``) is said by the field itself (see ``Chunk``), and
travels as a tag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedsim.engine.assignments import BY_ROW, Broadcast, Chunk
from fedsim.errors import ClientError
from fedsim.exchange.payload import Payload
from fedsim.flower.answers import ReplyTo
from fedsim.flower.records import Records, put, taken
from fedsim.task.layout import Layout

Stamp = tuple[int, int]  # round and exchange in which a client's state was made
WHOLE, STAMP, NAMES, ANY = "a whole number, not below 0", "two of these", "names", "anything"
FIELDS: dict[str, dict[str, Any]] = {  # of a message's records, and what each is
    "broadcast": {
        "round": WHOLE,
        "task": str,
        "fold": NAMES,
        "keep": bool,
        "architecture": WHOLE,
        "held": str,
    }
    | {"payload": Payload, "standing": Payload},
    "ask": {
        "run": str,
        "exchange": WHOLE,
        "client": WHOLE,
        "state": STAMP,
        "each:steps": WHOLE,
        "each:turns": WHOLE,
    }
    | {"each:each": Payload, "row:rows": Payload},
}
WIRE = 6  # of this format: both sides must speak the same


class MessageError(ClientError):
    """What came is no message: a field of it is not there, not known, or no such thing."""


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

    @property
    def address(self) -> ReplyTo:
        """What the answer repeats."""
        return ReplyTo(self.run, self.broadcast.round, self.exchange, self.client)


def shared_records(broadcast: Broadcast, layout: Layout, held: str = "") -> Records:
    """What all clients of an exchange receive; use the same records for all, so that the link stores them once.

    ``held`` is the content of the standing part if only that is to travel, as to clients that have it.
    """
    plain: dict[str, Any] = {"fold": list(broadcast.fold)}
    if held:
        plain["held"], broadcast = held, replace(broadcast, standing=None)
    records: Records = {}
    for f in _fields(broadcast, but=("fold",)):
        put(records, plain, f.name, getattr(broadcast, f.name), f"Broadcast.{f.name}", layout)
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
            put(records, plain, f"row:{f.name}", mine, what, layout)
        elif f.metadata != BY_ROW and client in value:
            put(records, plain, f"each:{f.name}", value[client], what, layout)
    return RecordDict({**shared, "ask": ConfigRecord(plain), **{f"ask.{k}": v for k, v in records.items()}})


def addressed(content: RecordDict) -> ReplyTo:
    """Whose part of which exchange a message is.

    Raises:
        MessageError: naming a field that is not there, or no such thing.
    """
    ask, broadcast = _plain(content, "ask"), _plain(content, "broadcast")
    return ReplyTo(
        _field("ask", ask, "run"),
        _field("broadcast", broadcast, "round"),
        _field("ask", ask, "exchange"),
        _field("ask", ask, "client"),
    )


def address_of_any(content: RecordDict) -> ReplyTo:
    """The same of a message that may be none: what of it can be read, so that the answer finds its way."""
    found: dict[str, Any] = {}
    for name, place in (("run", "ask"), ("round", "broadcast"), ("exchange", "ask"), ("client", "ask")):
        try:
            found[name] = _field(place, _plain(content, place), name)
        except MessageError:
            found[name] = "" if name == "run" else 0
    return ReplyTo(**found)


def read_ask(content: RecordDict, layout: Layout) -> Ask:
    """The inverse of :func:`ask_records`.

    Raises:
        MessageError: naming a field that is not there, unknown, or no such thing.
    """
    to = addressed(content)
    about, parts = taken(content, "ask", layout), taken(content, "broadcast", layout)
    for place, values in (("ask", about), ("broadcast", parts)):
        for name in values:
            _field(place, values, name)
    for name in ("task", "fold", "payload"):
        _field("broadcast", parts, name)
    held = parts.pop("held", "")
    broadcast = Broadcast(**{**parts, "fold": dict.fromkeys(parts["fold"], ("stack",))})
    own: dict[str, Any] = {}
    for name, value in about.items():
        kind, _, key = name.partition(":")
        if kind == "each":
            own[key] = {to.client: value}
        elif kind == "row":
            own[key] = value.arrays
    state = tuple(about["state"]) if "state" in about else None
    chunk = Chunk([to.client], **own)
    return Ask(about["run"], about["exchange"], cast(Stamp | None, state), broadcast, chunk, held)


def _plain(content: RecordDict, name: str) -> dict[str, Any]:
    found = content.get(name)
    if not isinstance(found, ConfigRecord):
        raise MessageError(f"the message has no record '{name}'")
    return dict(found)


def _field(place: str, values: Mapping[str, Any], name: str) -> Any:
    """The value of a field, if it is what can stand there."""
    kind = FIELDS[place].get(name) or _added(place, name)
    if kind is None:
        raise MessageError(f"the message: {place} holds {name!r:.80}, which is not known")
    if name not in values:
        raise MessageError(f"the message: {place} lacks '{name}'")
    value = values[name]
    good = {
        WHOLE: type(value) is int and value >= 0,
        STAMP: isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 0 for v in value),
        NAMES: isinstance(value, list) and all(isinstance(v, str) for v in value),
        ANY: True,
    }
    if not (good[kind] if isinstance(kind, str) else type(value) is kind):
        wanted = kind if isinstance(kind, str) else kind.__name__
        raise MessageError(f"the message: {place}.{name} is {value!r:.40}, expected {wanted}")
    return value


def _added(place: str, name: str) -> Any:
    """What a field is that messages have beyond ``FIELDS``; None of one that they have not."""
    tag, _, key = name.rpartition(":")
    fields = {f.name: f for f in dataclasses.fields(Broadcast if place == "broadcast" else Chunk)}
    if place == "ask" and tag != ("row" if key in fields and fields[key].metadata == BY_ROW else "each"):
        return None
    return (Payload if tag == "row" else ANY) if key in fields else None


def stamp_state(stamp: Stamp) -> dict[str, Tensor]:
    """What the server keeps in place of a client's state: where the real one stands."""
    return {"stamp": torch.tensor(stamp)}


def read_stamp(state: Mapping[str, Tensor]) -> Stamp | None:
    """The inverse of :func:`stamp_state`; None of an empty state."""
    if not state:
        return None
    round, exchange = state["stamp"].tolist()
    return round, exchange


def _fields(thing: Any, but: tuple[str, ...]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(thing) if f.name not in but]
