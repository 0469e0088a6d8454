"""What a worker asks of an update before and after it is folded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedsim.engine.assignments import Broadcast
from fedsim.exchange.entries import lengths_of
from fedsim.exchange.payload import Payload, Update
from fedsim.exchange.release import Bounds, Leaving, Release
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.slots import finite

State = dict[str, Tensor]


class KnownBounds:
    """How long vectors may be, worked out once for all clients that were sent the same."""

    def __init__(self) -> None:
        self._of: tuple[object, object, str] | None = None
        self._bounds: Bounds = {}

    def of(self, release: Release, broadcast: Broadcast, message: Payload) -> Bounds:
        """Of an exchange; ``message``: what its client was sent."""
        fold, values, task, known = broadcast.fold, message.values, broadcast.task, self._of
        if known is None or known[0] is not fold or known[1] is not values or known[2] != task:
            self._of, self._bounds = (fold, values, task), release.bounds(fold, task, values)
        return self._bounds


def leaving(job: Job, layout: Layout, payload: Payload, bounds: Bounds) -> Leaving:
    """Whose update leaves, and how long its vectors are that may be no longer than their ``bounds``."""
    events, lengths = 0 if job.private is None else job.noisy.events, lengths_of(payload.arrays, bounds)
    who = job.seed, job.round, job.client, job.purpose, layout, job.message.values, job.residuals
    return Leaving(*who, job.local_part.spans, events, lengths, bounds)


def not_finite(payload: Payload, update: Update, lengths: Mapping[str, float]) -> str | None:
    """Names of arrays and state with NaN or infinity, or the weight if that is unusable; ``None`` if all is well.
    ``lengths``: of some of the arrays, which say it without another look."""
    bad = list[str]()
    for name, t in payload.arrays.items():
        if not math.isfinite(lengths.get(name, math.inf)) and not finite(t):
            bad.append(name)
    if update.state:
        bad += [f"its state '{k}'" for k, t in update.state.items() if not finite(t)]
    if bad or not 0 <= update.weight < float("inf"):
        return ", ".join(bad) or f"the weight ({update.weight})"
    return None


def resident_alone(job: Job, update: Update, payload: Payload) -> bool:
    """Whether an update's delta is the resident vector as ``minus`` left it, which the next client overwrites, and
    nothing else that its client hands back can lie there too."""
    delta = payload.arrays.get("delta")
    if delta is None or len(payload.arrays) > 1 or update.state or update.implied:
        return False
    return job.model.pads_with_zeros(delta)


def new_state(job: Job, update: Update, residuals: State | None = None) -> State | None:
    """What the client keeps from now on; ``None``: what it had."""
    if update.state is None and not job.kept and not residuals:
        return None
    new = {**(job.state if update.state is None else update.state), **(job.kept or {})}
    new |= {**job.residuals, **(residuals or {})}
    return {k: v.detach().clone() for k, v in new.items()}  # the next client overwrites resident vectors
