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
from fedsim.models.split import features_and_output
from fedsim.task.evaluation import features
from fedsim.task.heads import check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class MoonClient(SGDClient):
    """Adds ``mu * -log(e^{s_glob/tau} / (e^{s_glob/tau} + e^{s_prev/tau}))`` to the loss.

    ``s_glob`` and ``s_prev`` are cosine similarities of the current representation with those of the received model and
    of the client's previous local model (client state ``last`` (d,)). The representation is ``model.features``; the
    authors put a projection layer before the output, which a model of one's own may include there. Both frozen models
    run in evaluation mode with their own statistics (client state ``last/buffers`` (b,)), as in the authors' code.

    The contrast begins at a client's second turn; where the message brings ``first``, the run's initial model, that
    takes the place of a previous one at its first.
    """

    grad_only = False

    mu: float
    tau: float

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a representation."""
        check_features(task, "MOON")

    def fit(self, job: Job) -> Update:
        """SGD on the joint loss; the trained model is kept for the next turn."""
        if job.num_steps == 0:
            raise Refusal("no local steps")
        w = self.begin(job, job.start())
        for batch in job.batches():
            w = self.step(job, w, batch)
        state = {"last": w.clone()}
        if len(job.model.buffers):
            state["last/buffers"] = job.model.buffers.clone()
        return replace(self.finish(job, w), state=state)

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Put aside the statistics that the received and the previous model are measured with."""
        if len(received := job.model.buffers):
            job.keep["received/buffers"] = received.clone()
            own = job.state.get("last/buffers", job.message.arrays.get("first/buffers"))
            job.keep["last/buffers"] = job.keep["received/buffers"] if own is None else own
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step on cross entropy plus contrast."""
        last = job.state.get("last", job.message.arrays.get("first"))
        if last is None:
            return job.sgd(w, job.grad(w, batch))
        near = _frozen(job, job.anchor, "received/buffers", batch)
        far = _frozen(job, last, "last/buffers", batch)

        def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            z, logits = output
            pair = torch.stack([F.cosine_similarity(z, near), F.cosine_similarity(z, far)], dim=1) / self.tau
            contrast = F.cross_entropy(pair, torch.zeros(len(y), dtype=torch.long, device=y.device))
            return job.task.loss(logits, y) + self.mu * contrast

        return job.sgd(w, job.grad(w, batch, loss=loss, forward=_both))


def _frozen(job: Job, w: Tensor, statistics: str, batch: Batch) -> Tensor:
    """Features (B, f) of a model ``w`` (d,) that does not train, with the statistics that ``job.keep`` has for it."""
    job.meter.forward(len(batch.x))
    present = job.model.buffers.clone()
    if len(present):
        job.model.buffers.copy_(job.keep[statistics])
    found = features(job.model, w, [batch])[0]
    job.model.buffers.copy_(present)
    return found.flatten(1).clone()  # a tensor like any other again


def _both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    z, logits = features_and_output(model, x)
    return z.flatten(1), logits
