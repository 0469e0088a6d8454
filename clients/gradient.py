"""One gradient a round instead of local training (McMahan et al. 2017, FedSGD)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from clients.sgd import SGDClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class GradientClient(SGDClient):
    """Sends minus the mini-batch gradient as ``delta`` (d,): its one local step, divided by the learning rate."""

    vectorisable = grad_only = True
    reads_gradients: ClassVar[str] = "FedSGD"

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """From the received model."""
        job.sgd.demand_gradient_steps(self.reads_gradients)
        return w

    def finish(self, job: Job, w: Tensor) -> Update:
        """``(x_1 - x) / lr``."""
        update = super().finish(job, w)
        return replace(update, arrays={"delta": update.arrays["delta"].div_(job.lr)})
