"""Sharpness-aware local steps: the gradient after an ascent on the same batch (Foret et al. 2021; Qu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.local.job import Job


def sam_gradient(
    job: Job, w: Tensor, batch: Batch, rho: float, alpha: float = 1.0, normalize: bool = True
) -> Tensor:
    """``(1 - alpha) g1 + alpha g2``: ``g1`` at ``w`` (..., d), ``g2`` at ``w + rho g1 / (|g1| + 1e-7)``.

    The norm is over the whole vector; ``normalize=False`` ascends by ``rho g1``. One gradient if ``rho`` or ``alpha``
    is 0.
    """
    g = job.grad(w, batch)
    if not rho or not alpha:
        return g
    scale = torch.as_tensor(rho, dtype=g.dtype)
    if normalize:
        scale = rho / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-7)
    ascent = job.grad(torch.addcmul(w, g, scale), batch, again=True)
    return ascent if alpha == 1 else g.mul_(1 - alpha).add_(ascent, alpha=alpha)


@dataclass(frozen=True, kw_only=True)
class SAMClient(SGDClient):
    """Local SAM steps (FedSAM)."""

    vectorisable = grad_only = True
    rho: float

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Descend along the gradient of the ascended point."""
        return job.sgd(w, sam_gradient(job, w, batch, self.rho))
