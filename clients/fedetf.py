"""FedETF's local rule: normalised features against a fixed dense ETF, with a balanced loss (Li et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.etf import simplex_etf
from clients.prior import log_prior
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.models.split import features_of
from fedsim.task.heads import HeadSlots, check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@lru_cache(maxsize=8)
def frame(num_classes: int, dim: int, seed: int) -> Tensor:
    """The fixed classifier (C, d) float64: unit rows."""
    return simplex_etf(num_classes, dim, seed)


@dataclass(frozen=True, kw_only=True)
class FedETFClient(SGDClient):
    """Trains the body by cross entropy of ``temperature v h/|h| + gamma log prior``, v the ETF's rows.

    The model's own head takes no part and is not changed.
    """

    grad_only = False

    temperature: float
    gamma: float
    seed: int

    def setup(self, task: Task, layout: Layout) -> None:
        """Build the ETF once per worker."""
        check_features(task, "FedETF")
        frame(*HeadSlots.of(layout).shape, self.seed)

    def fit(self, job: Job) -> Update:
        """Local training; one client at a time, since a step has a loss of its own."""
        return super().fit(job)

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The classifier and the prior."""
        job.keep["frame"] = self.temperature * frame(*job.head.shape, self.seed).to(w)
        shift = log_prior(job)
        job.keep["shift"] = self.gamma * shift if self.gamma else torch.zeros_like(shift)
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """SGD on the balanced loss."""

        def loss(h: Tensor, y: Tensor) -> Tensor:
            return job.task.loss(F.normalize(h) @ job.keep["frame"].T + job.keep["shift"], y)

        return job.sgd(w, job.grad(w, batch, loss=loss, forward=features_of))

    def finish(self, job: Job, w: Tensor) -> Update:
        """What weight decay did to the idle head is not sent."""
        update = super().finish(job, w)
        for span in job.layout.spans(job.layout.head):
            update.arrays["delta"][span] = 0
        return update
