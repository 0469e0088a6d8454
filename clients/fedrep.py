"""FedPer's and FedRep's local rules: the head stays with its client (Arivazhagan et al. 2019; Collins et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.task.heads import HeadSlots, check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class FedPerClient(SGDClient):
    """SGD on body and head together. Client state: the head, kept by the simulator (``keeps``)."""

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a linear head."""
        check_features(task, type(self).__name__.removesuffix("Client"))
        HeadSlots.of(layout)

    def keeps(self, layout: Layout) -> frozenset[str]:
        """The head."""
        return layout.head


@dataclass(frozen=True, kw_only=True)
class FedRepClient(FedPerClient):
    """First ``head_epochs`` on the head alone, then the configured work on the body alone."""

    grad_only = True
    head_epochs: int

    def fit(self, job: Job) -> Update:
        """Two phases; momentum starts anew in each, and the fixed body keeps its statistics."""
        if job.num_steps == 0:
            raise Refusal("no samples to train on")
        w, head = job.start(), job.layout.spans(job.layout.head)
        body = job.layout.spans({s.name for s in job.layout.params} - job.layout.head)
        statistics = job.model.buffers.clone()
        for batch in job.batches("head", self.head_epochs):
            _step(job, w, batch, head)
        job.model.buffers.copy_(statistics)
        job.end_phase("head")
        for batch in job.batches():
            _step(job, w, batch, body)
        return self.finish(job, w)


def _step(job: Job, w: Tensor, batch: Batch, spans: Sequence[slice]) -> None:
    """One SGD step of the parameters in ``spans`` alone, in place."""
    g = job.grad(w, batch)
    job.sgd.cut(spans)
    moved = job.sgd(torch.cat([w[s] for s in spans]), torch.cat([g[s] for s in spans]))
    for span, part in zip(spans, torch.split(moved, [s.stop - s.start for s in spans]), strict=True):
        w[span] = part
