"""Peers: local SGD on the peer's own model, with an optimiser that may go on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from clients.base import Client
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class PeerClient(Client):
    """Local SGD from the peer's model, sent as its change ``delta`` (d,); every peer weighs 1.

    ``keep_momentum``: the heavy ball of ``client.momentum`` survives mixing, as client state ``momentum`` (d,); else
    it starts at zero each time.
    """

    vectorisable = grad_only = True
    keep_momentum: bool

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Take up the momentum."""
        if self.keep_momentum and "momentum" in job.state:
            job.sgd.momentum = job.state["momentum"].clone()
        return w

    def finish(self, job: Job, w: Tensor) -> Update:
        """Send the change of the model, keep the momentum."""
        update = replace(super().finish(job, w), weight=1.0)
        if self.keep_momentum and job.sgd.momentum is not None:
            return replace(update, state={"momentum": job.sgd.momentum.clone()})
        return update

    def test(self, job: Job) -> Update:
        """Measure the peer's model on the common test set."""
        if job.test is None:
            raise Refusal("no test set")
        return Update(metrics=job.evaluate(job.test))
