"""Ditto's local rule: a personal model held near the global one (Li, Hu, Beirami, Smith 2021, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from clients.sgd import SGDClient
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class DittoClient(SGDClient):
    """FedAvg, and beside it personal steps along ``g(v) + lam (v - x^t)``, as many as the global ones.

    Client state: the personal model ``v`` (d,) and its statistics ``v/buffers``. It starts as the model received at the
    client's first turn.
    """

    grad_only = True
    lam: float

    def fit(self, job: Job) -> Update:
        """The personal model, then the global one."""
        if job.num_steps == 0:
            raise Refusal("no samples to train on")
        v = self.own_weights(job)
        pull = job.anchor * -self.lam
        for batch in job.batches("personal"):
            v = job.sgd.pulled(v, job.grad(v, batch), pull, self.lam, whole=True)
        state = {"v": v.clone()}
        if len(job.model.buffers):
            state["v/buffers"] = job.model.buffers.clone()
        job.end_phase("personal")
        return replace(super().fit(job), state=state)

    def evaluate(self, job: Job) -> Update:
        """Measure the personal model, and the received one as ``global``, on this client's own test samples."""
        if job.holdout is None or len(job.holdout) == 0:
            raise Refusal("no test samples of its own")
        received = {f"global/{k}": v for k, v in job.evaluate(job.holdout).items()}
        found = job.measure(job.holdout, self.own_weights(job))
        return Update(metrics={**found, **received}, weight=len(job.holdout))

    def own_weights(self, job: Job) -> Tensor:
        """The personal model, in the resident vectors."""
        v = job.start()
        if "v" in job.state:
            v.copy_(job.state["v"])
        if "v/buffers" in job.state:
            job.model.buffers.copy_(job.state["v/buffers"])
        return v
