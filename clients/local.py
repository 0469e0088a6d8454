"""Clients that keep their own model and never share it: the reference without federation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.base import Client
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class LocalClient(Client):
    """Trains its own model, client state ``w`` (d,), from the common start; sends nothing."""

    vectorisable = True

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Continue from the own model."""
        return w.copy_(job.state["w"]) if "w" in job.state else w

    def finish(self, job: Job, w: Tensor) -> Update:
        """Keep the model, its statistics included."""
        state = {"w": w.clone(), **job.local_part.keep(job.model, w)}
        return Update(state=state, metrics=job.report(), weight=len(job.data))

    def evaluate(self, job: Job) -> Update:
        """Measure the own model on the held-out samples."""
        if job.holdout is None or len(job.holdout) == 0:
            raise Refusal("no held-out samples")
        return Update(metrics=job.evaluate(job.holdout, job.state.get("w")), weight=len(job.holdout))

    def test(self, job: Job) -> Update:
        """Measure the own model on the common test set."""
        if job.test is None:
            raise Refusal("no test set")
        return Update(metrics=job.evaluate(job.test, job.state.get("w")))
