"""HeteroFL's local rule: SGD on a sub-model of the client's width (Diao, Ding, Tarokh 2021)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.local.optimiser import LocalSteps
from fedsim.models.split import logits_of, with_logits
from fedsim.system.cost import forward_flops
from fedsim.task.heads import HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.submodels import narrow
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


@dataclass(frozen=True, kw_only=True)
class HeteroFLClient(SGDClient):
    """Trains the sub-model that its message (d_sub,) belongs to; ``delta`` (d_sub,) goes back.

    ``scale``: outputs of hidden layers are divided by the width while training. ``mask``: logits of classes that the
    client has no sample of are set to zero in the loss. ``output_rows=classes``: the head's rows of those classes stay
    as they were received, and ``classes`` (C,), 1 or 0, says which the client has.
    """

    grad_only = False

    scale: bool
    mask: bool
    output_rows: str = "width"
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
        inner.sgd = LocalSteps(job.local, job.round, inner.model.layout)
        return super().fit(inner)

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Plain SGD; with ``mask`` on the masked loss."""
        if not self.mask:
            return super().step(job, w, batch)
        own = self._classes(job)

        def loss(output: Any, y: Tensor) -> Tensor:
            z = logits_of(output)
            keep = torch.zeros(z.shape[-1], dtype=z.dtype, device=z.device)
            keep[own] = 1
            return job.task.loss(with_logits(output, z * keep), y)

        return job.sgd(w, job.grad(w, batch, loss=loss))

    def finish(self, job: Job, w: Tensor) -> Update:
        """The sub-model's change, of the head only what the client's classes have learnt."""
        update = super().finish(job, w)
        if self.output_rows == "width":
            return update
        delta, head = update.arrays["delta"], HeadSlots.of(job.layout)
        has = delta.new_zeros(head.shape[0])
        has[self._classes(job)] = 1
        for slot in filter(None, (head.weight, head.bias)):
            delta[slot.span].view(len(has), -1).mul_(has[:, None])
        return replace(update, arrays={"delta": delta, "classes": has})

    @staticmethod
    def _classes(job: Job) -> Tensor:
        """Those that the client has samples of."""
        if "mask" not in job.keep:
            job.keep["mask"] = torch.unique(job.data.everything().y)
        return job.keep["mask"]

    def _model(self, job: Job, width: float) -> tuple[FlatModel, float]:
        """The sub-model, and its flops as a share of the whole model's."""
        if width not in self.cache:
            example = job.task.example
            assert example is not None
            device = job.model.w.device
            whole = copy.deepcopy(job.task.model).to(job.model.w.dtype)
            run = job.task.output
            sub, _ = narrow(whole, width, example, self.scale, run)
            effort = forward_flops(sub, example, run) / max(forward_flops(whole, example, run), 1)
            flat = FlatModel(sub, job.model.w.dtype, device.type, aligned=False)
            flat.module.train()
            flat.autocast, flat.backward.scale = job.model.autocast, job.model.backward.scale
            self.cache[width] = flat, effort
        return self.cache[width]
