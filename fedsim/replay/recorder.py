"""What went over the wire in one round of a serial run: hash and copy of every array that a client got and sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult, Plan
from fedsim.engine.worker import Worker
from fedsim.exchange.fold import Folder
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.packing import hashes_of
from fedsim.exchange.payload import Outcome, Payload, Update
from fedsim.local.job import Job
from fedsim.replay.again import Stop
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout

Place = tuple[int, int, str]  # exchange of the round, client, message/NAME, update/NAME or sent/NAME
KINDS = (
    "message",
    "update",
    "sent",
)  # in the order in which they come about; sent: what a release makes of an update


class Recorder:
    """Keeps what is exchanged in the last round of ``stop``, the arrays as files in ``folder``."""

    def __init__(self, stop: Stop, folder: Path):
        self.stop, self.folder = stop, folder
        self.hashes: dict[Place, str] = {}  # in the order in which things were computed
        self.tasks: dict[int, str] = {}  # of each exchange
        self.layouts: dict[int, Layout] = {}  # of the model that each is about
        self.start = ""  # hash of the model as it was drawn or given
        self._broadcast: Broadcast | None = None
        self._exchange = -1
        self._round = 0

    def worker(self, plan: Plan) -> Worker:
        """A worker that is listened to."""
        return _Listened(plan, self)

    def begin(self, broadcast: Broadcast) -> None:
        """Chunks of this broadcast follow."""
        if broadcast is not self._broadcast:
            self._exchange = 0 if self._round != self.stop.now else self._exchange + 1
            self._broadcast, self._round = broadcast, self.stop.now

    def add(self, client: int, prefix: str, payload: Payload, layout: Layout) -> None:
        """A message or an update of ``client`` about a model of ``layout``, if the round is looked at."""
        assert self._broadcast is not None
        if self.stop.now != self.stop.last or is_measuring(self._broadcast.task):
            return
        self.tasks[self._exchange], self.layouts[self._exchange] = self._broadcast.task, layout
        for name, digest in hashes_of(payload, layout, prefix).items():
            self.hashes[self._exchange, client, name] = digest
        for name, array in payload.arrays.items():
            torch.save(array.detach().clone(), self._file((self._exchange, client, f"{prefix}{name}")))

    def array(self, place: Place) -> Tensor | None:
        """What was recorded there; ``None`` of values."""
        file = self._file(place)
        return torch.load(file, weights_only=True) if file.exists() else None

    def _file(self, place: Place) -> Path:
        exchange, client, name = place
        return self.folder / f"{exchange}-{client}-{name.replace('/', '-')}.pt"


class _Listened(Worker):
    def __init__(self, plan: Plan, recorder: Recorder, data: FederatedData | None = None):
        """``data``: those of a first worker, beside which this one computes another model."""
        super().__init__(plan, data)
        self._recorder, self._first = recorder, data is None
        if self._first:
            recorder.start = hash_tensors(self.model.layout.params.pieces(self.model.w))

    def of_other(self, plan: Plan) -> Worker:
        return _Listened(plan, self._recorder, self.data)

    def run(self, broadcast: Broadcast, chunk: Chunk, folder: Folder | None = None) -> ChunkResult:
        if self._first:
            self._recorder.begin(broadcast)
        if broadcast.architecture:  # another one listens
            return super().run(broadcast, chunk, folder)
        layout = self.model.layout
        for client in chunk.clients:
            each = chunk.part(client)
            arrays, values = dict(broadcast.payload.arrays), dict(broadcast.payload.values)
            if each is not None:
                arrays, values = arrays | dict(each.arrays), values | dict(each.values)
            self._recorder.add(client, "message/", Payload(arrays, values), layout)
        return super().run(broadcast, chunk, folder)

    def _accept(
        self, job: Job, update: Update, broadcast: Broadcast, folder: Folder, outcome: Outcome
    ) -> dict[str, Tensor] | None:
        self._recorder.add(outcome.client, "update/", self.sent(update, job, broadcast), self.model.layout)
        return super()._accept(job, update, broadcast, folder, outcome)

    def leaves(self, travels: Payload, outcome: Outcome) -> None:
        if self.plan.release is not None:
            self._recorder.add(outcome.client, "sent/", travels, self.model.layout)
        super().leaves(travels, outcome)


def first_difference(one: Recorder, other: Recorder) -> dict[str, Any] | None:
    """The first exchange, client and array in which two recorded rounds differ, and how; ``None`` if in none.

    Messages come before the updates that answer them; ``tensor`` is the first of the layout in which a flat vector
    differs, ``largest`` the most by which entries that are finite differ, ``nonfinite`` how many others do, ``ulps``
    how many representable numbers lie between the two at most.
    """
    for place in sorted({**one.hashes, **other.hashes}, key=_order):
        if one.hashes.get(place) == other.hashes.get(place):
            continue
        exchange, client, name = place
        kind, _, vector = name.partition("/")
        task = one.tasks.get(exchange) or other.tasks.get(exchange)
        found: dict[str, Any] = {
            "exchange": exchange,
            "task": task,
            "client": client,
            "kind": kind,
            "vector": vector,
        }
        if place not in one.hashes or place not in other.hashes:
            return found | {"only_in": "A" if place in one.hashes else "B"}
        a, b = one.array(place), other.array(place)
        if a is None or b is None:
            return found
        if a.shape != b.shape or a.dtype != b.dtype:
            return found | {"shapes": [f"{tuple(t.shape)} {t.dtype}" for t in (a, b)]}
        return found | _within(a, b, one.layouts[exchange])
    return None


def _order(place: Place) -> tuple[int, int, int, bool]:
    """Messages before updates and what is made of them, arrays, as they were sent, before values."""
    exchange, client, name = place
    return exchange, client, KINDS.index(name.partition("/")[0]), name.endswith("(values)")


def _within(a: Tensor, b: Tensor, layout: Layout) -> dict[str, Any]:
    """The first tensor in which two arrays differ, how many of its entries do, and by how much at most."""
    slots = next((s for s in layout.vectors.values() if s.size and s.holds(a) and s.holds(b)), None)
    parts: Mapping[str, tuple[Tensor, Tensor]] = {"": (a, b)}
    if slots is not None:
        named = slots.named(b)
        parts = {name: (t, named[name]) for name, t in slots.named(a).items()}
    name, (x, y) = next((n, pair) for n, pair in parts.items() if not _same(*pair))
    differ = ~((x == y) | (x.isnan() & y.isnan())) if x.is_floating_point() else x != y
    found: dict[str, Any] = {"tensor": name or None, "entries": [int(differ.sum()), differ.numel()]}
    apart = (x[differ].double() - y[differ].double()).abs()
    if (finite := apart[apart.isfinite()]).numel():
        found["largest"] = float(finite.max())
    if len(apart) > len(finite):
        found["nonfinite"] = len(apart) - len(finite)
    if x.dtype in (torch.float32, torch.float64):
        found["ulps"] = int((_rank(x) - _rank(y)).abs().max())
    return found


def _same(x: Tensor, y: Tensor) -> bool:
    return hash_tensors([x]) == hash_tensors([y])


def _rank(x: Tensor) -> Tensor:
    """The place of each number among all representable ones, int64: neighbours differ by 1, -0 and 0 by none."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
    least = -(2**31) if x.dtype == torch.float32 else -(2**63)
    return torch.where(bits < 0, least - bits, bits)
