"""FedNova's local rule: SGD whose update is normalised by its own length of work (Wang et al. 2020, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clients.sgd import SGDClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FedNovaClient(SGDClient):
    """Sends ``delta = (x_K - x^t) / |a_i|_1`` and the value ``work = |a_i|_1``."""

    vectorisable = grad_only = True
    reads_gradients: ClassVar[str] = "FedNova"

    def finish(self, job: Job, w: Tensor) -> Update:
        """Normalise; the weight stays n_i."""
        job.sgd.demand_gradient_steps(self.reads_gradients)
        work = accumulated(job.num_steps, job.local.momentum)
        return Update(
            {"delta": job.delta(w).div_(work)},
            weight=job.weight(self.weighting),
            values={"work": work},
            metrics=job.report(),
        )


def accumulated(steps: float, momentum: float) -> float:
    """``|a_i|_1``: how often a local gradient enters ``x_K``; ``steps`` for plain SGD.

    With heavy-ball momentum m it is ``(K - m (1 - m^K) / (1 - m)) / (1 - m)`` (the paper's section 4.2).
    """
    m = momentum
    return steps if m == 0 else (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)
