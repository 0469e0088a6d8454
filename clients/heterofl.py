"""HeteroFL's local rule: SGD on a sub-model of the client's width (Diao, Ding, Tarokh 2021)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.system.cost import forward_flops
from fedsim.task.layout import Layout
from fedsim.task.submodels import narrow
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


@dataclass(frozen=True, kw_only=True)
class HeteroFLClient(SGDClient):
    """Trains the sub-model that its message (d_sub,) belongs to; ``delta`` (d_sub,) goes back.

    ``scale``: outputs of hidden layers are divided by the width while training. ``mask``: logits of classes that the
    client has no sample of are set to zero in the loss.
    """

    scale: bool
    mask: bool
    caches: ClassVar[frozenset[str]] = frozenset({"cache"})
    cache: dict[float, tuple[FlatModel, float]] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "cache": {}}

    def setup(self, task: Task, layout: Layout) -> None:
        """Forget another run's sub-models; they are built when they are first needed."""
        self.cache.clear()

    def fit(self, job: Job) -> Update:
        """Local SGD on the sub-model."""
        inner = copy.copy(job)  # its meter is the job's own
        inner.model, inner.meter.effort = self._model(job, float(job.values["width"]))  # type: ignore[arg-type]
        return super().fit(inner)

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Plain SGD; with ``mask`` on the masked loss."""
        if not self.mask:
            return super().step(job, w, batch)
        if "mask" not in job.keep:
            job.keep["mask"] = torch.unique(job.data.everything().y)

        def loss(output: Tensor, y: Tensor) -> Tensor:
            keep = torch.zeros(output.shape[-1], dtype=output.dtype, device=output.device)
            keep[job.keep["mask"]] = 1
            return job.task.loss(output * keep, y)

        return job.sgd(w, job.grad(w, batch, loss=loss))

    def _model(self, job: Job, width: float) -> tuple[FlatModel, float]:
        """The sub-model, and its flops as a share of the whole model's."""
        if width not in self.cache:
            example = job.task.example
            assert example is not None
            device = job.model.w.device
            whole = copy.deepcopy(job.task.model).to(job.model.w.dtype)
            sub, _ = narrow(whole, width, example, self.scale)
            effort = forward_flops(sub, example) / max(forward_flops(whole, example), 1)
            flat = FlatModel(sub, job.model.w.dtype, device.type, aligned=False)
            flat.module.train()
            flat.autocast = job.model.autocast
            self.cache[width] = flat, effort
        return self.cache[width]
