"""What a worker asks of an update before and after it is folded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedsim.exchange.payload import Payload, Update
from fedsim.local.job import Job
from fedsim.task.slots import finite

State = dict[str, Tensor]


def not_finite(payload: Payload, update: Update, lengths: Mapping[str, float]) -> str | None:
    """Names of arrays and state with NaN or infinity, or the weight if that is unusable; ``None`` if all is well.
    ``lengths``: of some of the arrays, which say it without another look."""
    unknown = payload.arrays
    if lengths:
        unknown = {k: t for k, t in unknown.items() if not math.isfinite(lengths.get(k, math.inf))}
    bad = [k for k, t in unknown.items() if not finite(t)]
    if update.state:
        bad += [f"its state '{k}'" for k, t in update.state.items() if not finite(t)]
    if bad or not 0 <= update.weight < float("inf"):
        return ", ".join(bad) or f"the weight ({update.weight})"
    return None


def resident_alone(job: Job, update: Update, payload: Payload) -> bool:
    """Whether an update's delta lies in the resident vector, which the next client overwrites, and nothing else that
    its client hands back can lie there too."""
    delta = payload.arrays.get("delta")
    if delta is None or len(payload.arrays) > 1 or update.state or update.implied:
        return False
    return delta.data_ptr() == job.model.w.data_ptr()


def new_state(job: Job, update: Update, residuals: State | None = None) -> State | None:
    """What the client keeps from now on; ``None``: what it had."""
    if update.state is None and not job.kept and not residuals:
        return None
    new = {**(job.state if update.state is None else update.state), **(job.kept or {})}
    new |= {**job.residuals, **(residuals or {})}
    return {k: v.detach().clone() for k, v in new.items()}  # the next client overwrites resident vectors
