"""FedNTD's local rule: distil the global model on the classes that are not true (Lee et al. 2022, eq. 4 to 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.models.split import logits_of


@dataclass(frozen=True, kw_only=True)
class FedNTDClient(SGDClient):
    """Adds ``beta tau^2 KL(q_global || q_local)`` to the loss; q are softmaxes at ``tau`` over the not-true logits."""

    grad_only = False

    beta: float
    tau: float

    def fit(self, job: Job) -> Update:
        """SGD on the joint loss."""
        if job.num_steps == 0:
            raise Refusal("no samples" if len(job.data) == 0 else "no local steps")
        w = self.begin(job, job.start())
        for batch in job.batches():
            w = self.step(job, w, batch)
        return self.finish(job, w)

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step on cross entropy plus distillation."""
        teacher = job.forward(job.anchor, batch.x, lambda m, x: logits_of(job.task.output(m, x)))

        def loss(output: Any, y: Tensor) -> Tensor:
            logits = logits_of(output)
            distilled = not_true_distillation(logits, teacher, y, self.tau)
            return job.task.loss(output, y) + self.beta * distilled

        return job.sgd(w, job.grad(w, batch, loss=loss))


def not_true_distillation(logits: Tensor, teacher: Tensor, y: Tensor, tau: float) -> Tensor:
    """``tau^2 KL(teacher || student)``, mean over the batch, of logits (B, C) without each sample's true class."""
    if logits.shape[1] < 2:
        return logits.sum() * 0
    others = torch.arange(logits.shape[1] - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y[:, None]).long()
    student, taught = (F.log_softmax(z.gather(1, others) / tau, dim=1) for z in (logits, teacher))
    return tau**2 * F.kl_div(student, taught, reduction="batchmean", log_target=True)
