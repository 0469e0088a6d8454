"""Local rules with a persistent dual: each client remembers how far its rounds have moved it (FedDyn, FedSpeed).

The simulator commits a client's new state only with an accepted update, so a lost reply loses the dual's step too, and
the server's mean dual stays the mean of the clients' duals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import Client
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout


@dataclass(frozen=True, kw_only=True)
class DualClient(Client):
    """FedDyn's local rule: steps along ``g - g_hat + lamb (x - x_start)``, then ``g_hat -= lamb (x_K - x_start)``.

    Client state: ``h`` (d,), the running sum of ``x_K - x_start`` over the client's rounds: ``g_hat = -lamb h``. With
    ``beta > 0`` also ``last`` (d,), its last local model, for the start ``x + beta (x - last)``.
    """

    vectorisable = grad_only = True
    lamb: float
    beta: float = 0.0
    dual_mean: str = "all"
    weighting: str = "uniform"

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

    def gradient(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """The loss gradient of a step ``(..., d)``."""
        return job.grad(w, batch)

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Corrected descent; with ``client.clip_pull=split`` ``lamb x`` is not clipped, as weight decay is not."""
        return job.sgd.pulled(w, self.gradient(job, w, batch), job.keep["c"], self.lamb)

    def finish(self, job: Job, w: Tensor) -> Update:
        """Send ``x_K - x``; store ``h + (x_K - x_start)``. What stays with the client is not averaged: no dual."""
        moved = job.shared(w - job.keep["start"])
        state = {"h": job.state["h"] + moved} | ({"last": w.clone()} if self.beta else {})
        arrays = {"delta": job.delta(w)}
        if self.dual_mean == "active":
            arrays["h"] = state["h"]
        elif self.beta:
            arrays["moved"] = moved
        return Update(arrays, weight=job.weight(self.weighting), state=state, metrics=job.report())
