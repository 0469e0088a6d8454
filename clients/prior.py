"""Losses that know how often each class occurs: logit adjustment and FedROD's balanced softmax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clients.heads import PrivateHeadClient
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.models.split import logits_of, with_logits
from fedsim.task.heads import Head


def log_prior(job: Job) -> Tensor:
    """Log share of each class (C,) among this client's samples; minus infinity for one it has not."""
    counts = job.class_counts.to(job.message.arrays["w"])
    return (counts / counts.sum()).log()


@dataclass(frozen=True, kw_only=True)
class LogitAdjustClient(SGDClient):
    """Cross entropy of ``logits + tau log prior`` (Menon et al. 2021, eq. 10).

    The prior is that of the message (``prior``, of all clients together), else the client's own.
    """

    grad_only = False

    tau: float

    def counts(self, job: Job) -> Update:
        """Samples per class, for the prior of all."""
        return Update({"counts": job.class_counts})

    def fit(self, job: Job) -> Update:
        """Local training; one client at a time, since a step has a loss of its own."""
        return super().fit(job)

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """What is added to the logits."""
        prior = job.message.arrays.get("prior")
        job.keep["shift"] = self.tau * (log_prior(job) if prior is None else prior)
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """SGD on the adjusted loss."""

        def loss(output: Any, y: Tensor) -> Tensor:
            return job.task.loss(with_logits(output, logits_of(output) + job.keep["shift"]), y)

        return job.sgd(w, job.grad(w, batch, loss=loss))


@dataclass(frozen=True, kw_only=True)
class FedRODClient(PrivateHeadClient):
    """The shared model learns by balanced softmax, the private head by the plain loss of both heads' sum.

    Chen, Chao 2022, eq. 6 and 7: no gradient of the private head's loss reaches the shared model.
    """

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The balanced softmax's shift."""
        job.keep["shift"] = log_prior(job)
        return super().begin(job, w)

    def shared_loss(self, job: Job, h: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """Balanced softmax."""
        return job.task.loss(logits + job.keep["shift"], y)

    def private_logits(self, h: Tensor, logits: Tensor, private: Head) -> Tensor:
        """The sum of both heads."""
        return logits + private(h)

    def personal(self, job: Job, shared: Head, private: Head) -> Mapping[str, Head]:
        """The sum, and the received head alone."""
        return {"": shared + private, "global": shared}
