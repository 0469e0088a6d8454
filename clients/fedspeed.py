"""FedSpeed's local rule: prox-correction and perturbed gradient (Sun et al. 2023, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import Client
from fedsim.data.local import Batch
from fedsim.job import Job
from fedsim.payload import Update
from fedsim.vectors import Layout


@dataclass(frozen=True, kw_only=True)
class FedSpeedClient(Client):
    """Local half of FedSpeed; see ``strategies.fedspeed.FedSpeed`` for symbols and options.

    Client state: ``h`` (d,), the running sum of ``x_K - x`` over the client's rounds; the paper's prox-correction is
    ``g_hat = -lamb h``. With ``beta > 0`` also ``last`` (d,), its last local model.
    """

    lamb: float
    rho: float
    alpha: float
    normalize: bool
    beta: float
    dual_mean: str
    weighting: str

    def init_state(self, layout: Layout) -> dict[str, Tensor]:
        """``h = 0`` before the first participation."""
        return {"h": torch.zeros(layout.dim)}

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The start, and the part of a step that does not move: ``c = -g_hat - lamb x_start = lamb (h - x_start)``."""
        if self.beta and "last" in job.state:
            w.add_(job.anchor - job.state["last"], alpha=self.beta)
        job.keep["start"] = w.clone() if self.beta else job.anchor
        job.keep["c"] = (job.state["h"] - job.keep["start"]).mul_(self.lamb)
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Steps 1 of Algorithm 1, client side: both gradients on one mini-batch, then the corrected descent."""
        g = job.grad(w, batch)
        if self.rho and self.alpha:
            scale = (
                self.rho / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-7)
                if self.normalize
                else self.rho
            )
            ascent = job.grad(torch.addcmul(w, g, torch.as_tensor(scale, dtype=g.dtype)), batch, again=True)
            g = ascent if self.alpha == 1 else g.mul_(1 - self.alpha).add_(ascent, alpha=self.alpha)
        return job.sgd(w, g, correction=job.keep["c"], decay=self.lamb)

    def finish(self, job: Job, w: Tensor) -> Update:
        """Send ``x_K - x``; store ``h + (x_K - x_start)``. What stays with the client is not averaged: no dual."""
        moved = job.shared(w - job.keep["start"])
        state = {"h": job.state["h"] + moved} | ({"last": w.clone()} if self.beta else {})
        arrays = {"delta": job.delta(w)}
        if self.dual_mean == "active":
            arrays["h"] = state["h"]
        elif self.beta:
            arrays["moved"] = moved
        weight = len(job.data) if self.weighting == "samples" else 1.0
        return Update(arrays, weight=weight, state=state, metrics=job.report())
