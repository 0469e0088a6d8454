"""FedSpeed's local rule: prox-correction and perturbed gradient (Sun et al. 2023, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.dual import DualClient
from clients.sam import sam_gradient
from fedsim.data.local import Batch
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FedSpeedClient(DualClient):
    """FedDyn's steps along ``(1 - alpha) g1 + alpha g2``, both of one mini-batch, ``g2`` after an ascent by ``rho``."""

    vectorisable = grad_only = True
    rho: float
    alpha: float
    normalize: bool

    def gradient(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Algorithm 1, client side, first four lines of the inner loop."""
        return sam_gradient(job, w, batch, self.rho, self.alpha, self.normalize)
