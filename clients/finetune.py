"""Local fine-tuning: every client adapts the global model to its own samples before it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.sgd import SGDClient
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FineTuneClient(SGDClient):
    """Trains as FedAvg does; ``finetune_epochs`` of SGD on its own samples come before the measuring, and are lost."""

    finetune_epochs: int

    def evaluate(self, job: Job) -> Update:
        """Measure the fine-tuned model, and the received one as ``global``, on this client's own test samples."""
        if job.holdout is None or len(job.holdout) == 0:
            raise Refusal("no test samples of its own")
        received = {f"global/{k}": v for k, v in job.evaluate(job.holdout).items()}
        found = job.measure(job.holdout, self.own_weights(job))
        return Update(metrics={**found, **received}, weight=len(job.holdout))

    def own_weights(self, job: Job) -> Tensor:
        """The received model after fine-tuning."""
        w = job.start()
        for batch in job.batches("fine-tune", self.finetune_epochs):
            w = self.step(job, w, batch)
        return w
