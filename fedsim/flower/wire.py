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
from fedsim.exchange.payload import Payload
from fedsim.flower.answers import ReplyTo
from fedsim.flower.records import Records, config_of, put, taken
from fedsim.task.layout import Layout

Stamp = tuple[int, int]  # round and exchange in which a client's state was made
WIRE = 6  # of this format: both sides must speak the same


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


def asked(content: RecordDict) -> int:
    """The client that a message is for."""
    return int(config_of(content, "ask")["client"])


def addressed(content: RecordDict) -> ReplyTo:
    """Whose part of which exchange a message is."""
    about = config_of(content, "ask")
    return ReplyTo(about["run"], config_of(content, "broadcast")["round"], about["exchange"], about["client"])


def read_ask(content: RecordDict, layout: Layout) -> Ask:
    """The inverse of :func:`ask_records`."""
    about, client = taken(content, "ask", layout), asked(content)
    parts = taken(content, "broadcast", layout)
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
