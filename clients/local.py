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

    vectorisable = grad_only = True

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Continue from the own model."""
        return w.copy_(job.state["w"]) if "w" in job.state else w

    def finish(self, job: Job, w: Tensor) -> Update:
        """Keep the model, its statistics included."""
        state = {"w": w.clone(), **job.local_part.keep(job.model, w)}
        return Update(state=state, metrics=job.report(), weight=len(job.data))

    def own_weights(self, job: Job) -> Tensor:
        """The own model; of a client that never trained the common start."""
        received = job.start()
        return job.state.get("w", received)

    def test(self, job: Job) -> Update:
        """Measure the own model on the common test set."""
        if job.test is None:
            raise Refusal("no test set")
        return Update(metrics=job.measure(job.test, self.own_weights(job)))
