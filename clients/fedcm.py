"""FedCM's local rule: client-level momentum towards the global direction (Xu et al. 2021, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from clients.fednova import accumulated
from clients.sam import sam_gradient
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FedCMClient(SGDClient):
    """Steps along ``alpha g + (1 - alpha) D``, D the direction in the message; ``rho > 0`` takes g as SAM does."""

    vectorisable = grad_only = True
    reads_gradients: ClassVar[str] = "FedCM"
    alpha: float
    rho: float = 0.0

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The constant part ``(1 - alpha) D``."""
        job.sgd.demand_gradient_steps(self.reads_gradients)
        job.keep["momentum"] = job.message.arrays["direction"] * (1 - self.alpha)
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Mixed descent."""
        return job.sgd(
            w, sam_gradient(job, w, batch, self.rho).mul_(self.alpha), correction=job.keep["momentum"]
        )

    def finish(self, job: Job, w: Tensor) -> Update:
        """Also report the number of local steps, by which the server scales the next direction.

        With local momentum: how often a direction enters ``x_K``.
        """
        steps = accumulated(job.num_steps, job.local.momentum)
        return replace(super().finish(job, w), values={"steps": steps})
