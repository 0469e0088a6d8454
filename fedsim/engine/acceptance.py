"""What a worker looks at in an update before it is folded, and what its client keeps then."""

from __future__ import annotations

from torch import Tensor

from fedsim.exchange.payload import Payload, Update
from fedsim.local.job import Job
from fedsim.task.vectors import finite

State = dict[str, Tensor]


def not_finite(payload: Payload, update: Update) -> str | None:
    """Names of arrays and state with NaN or infinity, or the weight if that is unusable; ``None`` if all is well."""
    bad = [k for k, t in payload.arrays.items() if not finite(t)]
    bad += [f"its state '{k}'" for k, t in (update.state or {}).items() if not finite(t)]
    if bad or not 0 <= update.weight < float("inf"):
        return ", ".join(bad) or f"the weight ({update.weight})"
    return None


def new_state(job: Job, update: Update, residuals: State | None = None) -> State | None:
    """What the client keeps from now on; ``None``: what it had."""
    if update.state is None and not job.kept and not residuals:
        return None
    new = {**(job.state if update.state is None else update.state), **(job.kept or {})}
    new |= {**job.residuals, **(residuals or {})}
    return {k: v.detach().clone() for k, v in new.items()}  # the next client overwrites resident vectors
