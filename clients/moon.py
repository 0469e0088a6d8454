"""MOON's local rule: model-contrastive learning (Li, He, Song 2021, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.task.heads import check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class MoonClient(SGDClient):
    """Adds ``mu * -log(e^{s_glob/tau} / (e^{s_glob/tau} + e^{s_prev/tau}))`` to the loss.

    ``s_glob`` and ``s_prev`` are cosine similarities of the current representation with those of the received model and
    of the client's previous local model (client state ``last`` (d,)). The representation is ``model.features``; the
    authors put a projection layer before the output, which a model of one's own may include there.
    """

    mu: float
    tau: float

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a representation."""
        check_features(task, "MOON")

    def fit(self, job: Job) -> Update:
        """SGD on the joint loss; the contrast begins with a client's second participation."""
        if job.num_steps == 0:
            raise Refusal("no local steps")
        w = self.begin(job, job.start())
        for batch in job.batches():
            w = self.step(job, w, batch)
        last = w.clone()
        return replace(self.finish(job, w), state={"last": last})

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step on cross entropy plus contrast."""
        if "last" not in job.state:
            return job.sgd(w, job.grad(w, batch))
        near = job.forward(job.anchor, batch.x, _features)
        far = job.forward(job.state["last"], batch.x, _features)

        def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            z, logits = output
            pair = torch.stack([F.cosine_similarity(z, near), F.cosine_similarity(z, far)], dim=1) / self.tau
            contrast = F.cross_entropy(pair, torch.zeros(len(y), dtype=torch.long, device=y.device))
            return job.task.loss(logits, y) + self.mu * contrast

        return job.sgd(w, job.grad(w, batch, loss=loss, forward=_both))


def _features(model: nn.Module, x: Tensor) -> Tensor:
    return model.features(x).flatten(1)  # type: ignore[operator, no-any-return]


def _both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    z = model.features(x)  # type: ignore[operator]
    return z.flatten(1), model.head(z)  # type: ignore[operator]
