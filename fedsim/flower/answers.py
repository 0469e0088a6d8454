"""What a client answers, as Flower's records and back.

The reader believes nothing: every record and field must be there, be known and have its type, and of arrays it reads
the header before the numbers. Whether the answer fits what was asked is said by ``fedsim.flower.checking``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.packing import sent_bytes, slots_of
from fedsim.exchange.payload import Outcome, Payload
from fedsim.flower.longvectors import MOST_PARTS, arrived
from fedsim.flower.records import AS_IS, Records, put
from fedsim.task.layout import Layout, Slots

Fits = Callable[
    [str, tuple[int, ...], torch.dtype], None
]  # raises ClientError for an array that was not asked for

UPDATE = ("ok", "nonfinite")  # kinds of answers that bring arrays and values
KINDS = (*UPDATE, "refused", "failed")
RECORDS = {"outcome": ConfigRecord, "flags": ConfigRecord, "metrics": MetricRecord}
ARRAYS = {"outcome.update": ArrayRecord, "outcome.update.values": ConfigRecord}
FIELDS = {"run": str, "round": int, "exchange": int, "client": int, "kind": str, "weight": float}
FIELDS |= {"samples": int, "gradients": float, "forwards": float, "seconds": float}
FLAGS = ("stateful", "restarted", "lacks", "lost")
MOST = 1000  # letters of a reason, and entries of a record
BYTES = 1 << 24  # of a value that is bytes: how many a method's codes take is for its ``objection``
LONGEST = 200  # letters of a name
LARGEST = 2.0**53  # of counts: whole numbers of that size have no neighbours left out


class ReplyTo(NamedTuple):
    """Whose part of which exchange of which run; an answer repeats it."""

    run: str
    round: int  # from 0
    exchange: int
    client: int


@dataclass(frozen=True)
class NodeAnswer:
    """What one client sent: its row of the log and, if it contributed, its update."""

    outcome: Outcome
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    stateful: bool = False  # it made a new state, which lies at the node
    restarted: bool = False  # its state was gone: it began again from the initial one
    lacks: bool = False  # nothing was done: what the message relies on is not there
    lost: bool = False  # nothing was done: its state is gone, and the configuration says that this is the end
    objected: bool = False  # the server does not take it, whatever the client says


def absent(client: int, kind: str, reason: str) -> NodeAnswer:
    """The answer of a client that sent none."""
    return NodeAnswer(Outcome(client, kind, reason=reason))


def failed(answer: NodeAnswer, reason: str, kind: str = "failed") -> NodeAnswer:
    """The same answer, made unusable."""
    outcome = replace(answer.outcome, kind=kind, reason=reason)
    return replace(answer, outcome=outcome, arrays={}, stateful=False, objected=True)


def answer_records(answer: NodeAnswer, layout: Layout | None, to: ReplyTo) -> RecordDict:
    """Content of a reply to the question at ``to``; ``layout`` is needed for one that holds arrays."""
    o, records = answer.outcome, Records()
    plain: dict[str, Any] = {"kind": o.kind, "weight": float(o.weight), "samples": int(o.samples)}
    plain |= {k: float(getattr(o, k)) for k in ("gradients", "forwards", "seconds")} | to._asdict()
    if o.reason:
        plain["reason"] = said(o.reason)
    if o.kind in UPDATE:
        put(records, plain, "outcome.update", Payload(answer.arrays, o.values), "update", layout)
    records["outcome"] = ConfigRecord(plain)
    records["flags"] = ConfigRecord({name: getattr(answer, name) for name in FLAGS})
    records["metrics"] = MetricRecord({k: float(v) for k, v in o.metrics.items()})
    return RecordDict(dict(records))


def read_answer(content: RecordDict, layout: Layout, fits: Fits = lambda *array: None) -> NodeAnswer:
    """The inverse of :func:`answer_records`; ``bytes_up`` is counted here, from what arrived.

    Raises:
        ClientError: naming what is missing, unknown, of another type or impossible.
    """
    _known(content, "the reply", {**RECORDS, **ARRAYS}, optional=(*ARRAYS,))
    about = _fields(content["outcome"], "outcome", FIELDS, optional={"reason": str})
    flags = _fields(content["flags"], "flags", dict.fromkeys(FLAGS, bool))
    kind, weight = about["kind"], about["weight"]
    if kind not in KINDS:
        raise ClientError(f"outcome.kind={kind!r:.40}: must be one of {', '.join(KINDS)}")
    for name in ("samples", "gradients", "forwards", "seconds"):
        if not 0 <= about[name] <= LARGEST:
            raise ClientError(f"outcome.{name}={about[name]}: must lie between 0 and 2**53")
    if (kind in UPDATE) != ("outcome.update" in content):
        raise ClientError(f"a reply of kind {kind} {'lacks' if kind in UPDATE else 'holds'} an update")
    update = _update(content, layout, fits) if kind in UPDATE else Payload()
    outcome = Outcome(
        about["client"], kind, weight, update.values, _metrics(content["metrics"]),
        bytes_up=sent_bytes(update, layout), samples=about["samples"], gradients=about["gradients"],
        forwards=about["forwards"], seconds=about["seconds"], reason=said(about.get("reason", "")),
    )  # fmt: skip
    return NodeAnswer(outcome, update.arrays, **flags)


def address_of(content: RecordDict) -> ReplyTo:
    """What a reply says it answers; its fields are known to be there (see :func:`read_answer`)."""
    about: Any = content["outcome"]
    return ReplyTo(*(about[name] for name in ReplyTo._fields))


def said(text: str) -> str:
    """Text of another machine as one line of a log: no control characters, no more than ``MOST`` letters."""
    line = "".join(c if c.isprintable() else " " for c in text[: MOST + 1])
    return line if len(line) <= MOST else line[: MOST - 4] + " ..."


def _update(content: RecordDict, layout: Layout, fits: Fits) -> Payload:
    record: Any = content["outcome.update"]
    values: Any = content.get("outcome.update.values")
    if values is None or len(values) > MOST or len(record) > MOST + MOST_PARTS:
        raise ClientError("the update has no values, or too many entries")
    found, where = arrived(record, MOST), dict[str, Slots | None]()
    for a in found:
        if len(a.name) > LONGEST:
            raise ClientError(f"array {said(a.name)!r:.80}: no name, or twice the same")
        shape, slots = a.shape, None
        if a.kind != AS_IS:
            slots = slots_of(a.name, a.kind, shape, layout)
            shape = (*shape[:-1], slots.dim)
        where[a.name] = slots
        fits(a.name, shape, a.dtype)
    arrays = {a.name: a.whole(where[a.name]) for a in found}
    for name, value in values.items():
        most = BYTES if isinstance(value, bytes) else MOST
        if not 0 < len(name) <= LONGEST or (isinstance(value, str | bytes | list) and len(value) > most):
            raise ClientError(f"value {said(name)!r:.80}: no name, or longer than {most}")
    return Payload(arrays, Payload.of({}, dict(values)).values)


def _metrics(record: Any) -> dict[str, float]:
    if len(record) > MOST:
        raise ClientError(f"the reply holds {len(record)} metrics; at most {MOST} are taken")
    for name, value in record.items():
        if not 0 < len(name) <= LONGEST or not name.isprintable():
            raise ClientError(f"metric {said(name)!r:.80}: is no name of a metric")
        if type(value) is not float:
            raise ClientError(f"metric '{name}': {type(value).__name__}, expected one float")
    return dict(record)


def _known(found: Any, what: str, types: Mapping[str, type], optional: tuple[str, ...]) -> None:
    """Whether all that must be there is there, nothing else, and each of its type."""
    for name in types:
        if name not in found and name not in optional:
            raise ClientError(f"{what} lacks '{name}'")
    for name, value in found.items():
        if name not in types:
            raise ClientError(f"{what} holds {said(name)!r:.80}, which is not known")
        if type(value) is not types[name]:
            kind = type(value).__name__
            raise ClientError(f"{what}: '{name}' is {kind}, expected {types[name].__name__}")


def _fields(
    record: Any, what: str, types: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    extra = optional or {}
    _known(record, what, {**types, **extra}, (*extra,))
    return dict(record)
