"""FedProx's local rule: a proximal pull to the received model (Li et al. 2020, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FedProxClient(SGDClient):
    """Steps along ``g + mu (x - x^t)``."""

    vectorisable = grad_only = True
    mu: float

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The constant part of the pull, ``-mu x^t``."""
        job.keep["pull"] = job.anchor * -self.mu
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One pulled step."""
        return job.sgd.pulled(w, job.grad(w, batch), job.keep["pull"], self.mu)
