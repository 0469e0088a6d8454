"""A job: everything one client needs for one exchange, and the few vector operations that local rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.config.schema import ClientConfig
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import class_groups
from fedsim.data.trees import size
from fedsim.data.views import Traced, View
from fedsim.errors import ClientError
from fedsim.exchange.payload import Payload, Value
from fedsim.exchange.privacy import Privacy
from fedsim.local import along
from fedsim.local.belongings import Belongings
from fedsim.local.kept import LocalPart
from fedsim.local.meter import Meter
from fedsim.local.optimiser import LocalSteps
from fedsim.local.part_steps import PartSteps
from fedsim.local.sample_noise import refusal
from fedsim.local.showing import Showing
from fedsim.local.work import local_epochs, num_steps, step_size
from fedsim.task.evaluation import evaluate, mean_of, measured
from fedsim.task.heads import HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.losses import Forward, LossFn
from fedsim.task.task import Task, target
from fedsim.task.vectors import FlatModel


@dataclass(kw_only=True)
class Job(Belongings):
    """One client in one exchange: what it received and kept, its samples, and what it can do with them.

    A local rule is written with ``job.grad``, ``job.descend`` and ``job.sgd`` on vectors (..., d), ``job.anchor``,
    ``job.message``, ``job.state``, ``job.keep`` and ``job.steps``; these alone are there when a chunk of clients is
    computed at once (``fedsim.engine.vectorised.ChunkJob``). What is done only once in a job may use everything.

    ``state`` holds what the client kept; it, the message and ``anchor`` must not be written to. The parts: ``sgd``, the
    local optimiser, called for a step; ``meter``, what the job has cost; ``local_part``, what never leaves the client.
    """

    client: int
    round: int
    task: Task
    model: FlatModel
    local: ClientConfig
    seed: int
    message: Payload
    state: Mapping[str, Tensor]
    source: FederatedData
    keep: dict[str, Tensor] = field(default_factory=dict)  # constants set in ``begin``: (..., d), or (..., 1)
    metrics: dict[str, float] = field(default_factory=dict)  # reported with the training loss
    purpose: str = "fit"
    most_steps: int | None = None  # the device's time allows no more
    local_part: LocalPart = field(default_factory=LocalPart)
    views: Mapping[str, View] = field(default_factory=dict)  # named augmentations, for ``view``
    residuals: Mapping[str, Tensor] = field(default_factory=dict)  # what the release keeps at the client
    private: Privacy | None = None  # of single samples: every gradient is noisy

    def __post_init__(self) -> None:
        self.sgd = LocalSteps(self.local, self.round, self.model.layout)
        self.meter = Meter()
        self.kept: dict[str, Tensor] | None = None  # the local part after training, put aside by ``delta``
        self._anchor: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """Names and offsets of the flat vectors."""
        return self.model.layout

    @cached_property
    def head(self) -> HeadSlots:
        """Where the model's linear head lies in the flat vectors."""
        return HeadSlots.of(self.layout)

    @property
    def lr(self) -> float:
        """This round's local learning rate."""
        return self.sgd.lr

    @property
    def steps(self) -> int:
        """Mini-batch steps done so far."""
        return self.meter.steps

    @property
    def num_steps(self) -> int:
        """Local steps K that ``batches`` will give."""
        return self.steps_over(self.data)

    def steps_over(self, data: LocalData, epochs: int | None = None) -> int:
        """The same of ``batches(data=data)``, or of so many epochs."""
        local = self.local if epochs is None else replace(self.local, steps=None)
        steps = num_steps(local, len(data), epochs or self.epochs, self._smallest)
        return steps if self.most_steps is None else min(steps, self.most_steps)

    @property
    def epochs(self) -> int:
        """Local epochs of this client in this round."""
        return local_epochs(self.local, self.seed, self.round, self.client)

    @property
    def anchor(self) -> Tensor:
        """The received global vector ``(d,)``, read-only (with this client's own norm weights, where it keeps them)."""
        return self.message.arrays["w"] if self._anchor is None else self._anchor

    @property
    def values(self) -> Mapping[str, Value]:
        """Plain values of the message."""
        return self.message.values

    def view(self, name: str, batch: Batch) -> Batch:
        """``batch`` as ``views.NAME`` of the configuration (weak, strong) shows it, boxes and maps with their images;
        drawn by client, round, step and how often it was asked for in the step, whoever computes it and what else."""
        return self._showing.show(self, self.source.dataset, name, batch)

    def traced_view(self, name: str, batch: Batch) -> tuple[Batch, Traced]:
        """The same of a ``batch`` without targets, with the view, which knows how it moved the images."""
        return self._showing.traced(self, self.source.dataset, name, batch)

    @cached_property
    def _showing(self) -> Showing:
        return Showing(self.views)

    def start(self) -> Tensor:
        """The resident vector ``(d,)``, set to the received model; train on it in place."""
        received = self.message.arrays["w"]
        w = self.model.load(received, self.message.arrays.get("buffers"))
        if self.local_part.overlay(self.model, self.state):
            self._anchor = w.clone()
        return w

    def end_phase(self, name: str) -> None:
        """Put this phase's loss and share of clipped steps aside, as metrics under ``name/``, and begin the next."""
        found = self.report()
        self.metrics |= {f"{name}/{k}": found[k] for k in ("train_loss", "clipped") if k in found}
        self.restart()

    def restart(self) -> None:
        """Begin a second phase of local training: optimiser, losses and counted steps start anew, samples add up."""
        self.sgd.restart()
        self.meter.restart()
        self._showing.phase += 1

    def delta(self, w: Tensor) -> Tensor:
        """``w - anchor`` (d,), in place, for the update; what stays with the client is kept and not sent."""
        self.kept = self.local_part.keep(self.model, w)
        return self.local_part.zero(self.model.minus(w, self.anchor))

    def shared(self, v: Tensor) -> Tensor:
        """``v`` (..., d), in place, with zeros where parameters stay with the client."""
        return self.local_part.zero(v)

    def optimiser(self, params: str | Iterable[str] = "*", **settings: Any) -> PartSteps:
        """A further optimiser, of the parameters whose names match ``params``: see ``PartSteps``."""
        return PartSteps.further(self.sgd, self.model, params, settings)

    def batches(
        self, purpose: str = "batches", epochs: int | None = None, data: LocalData | None = None
    ) -> Iterator[Batch]:
        """This round's mini-batches, by the configured epochs or steps, batch size and order; with
        ``client.accumulate`` the micro-batches of its steps.

        Another ``purpose`` gives another order, for a phase of its own; ``epochs`` replaces the configured work,
        ``data`` the client's labelled samples (by ``job.unlabelled``, with a ``purpose`` of its own). A last batch of
        one sample is left out where the model has BatchNorm, which cannot train on it.
        """
        local, meter, pace = self.local, self.meter, self.sgd.pace
        data = self.data if data is None else data
        if self.private is not None:
            yield from self.noisy.batches(data, self.steps_over(data, epochs), purpose, meter)
            return
        whole = local if epochs is None else replace(local, steps=None)
        if pace is not None:
            pace.begin(num_steps(whole, len(data), epochs or self.epochs, self._smallest))
        limited = epochs is None and self.most_steps is not None
        for block in data.blocks(
            step_size(local),
            epochs=self.epochs if epochs is None else epochs,
            steps=self.steps_over(data) if limited else whole.steps,
            shuffle=local.shuffle,
            rng=self.rng(purpose),
            smallest=self._smallest,
        ):
            for batch in block:
                parts = (batch,) if pace is None else pace.parts(batch, local.batch_size, self._smallest)
                for part in parts:
                    yield part
                    meter.samples += part.size
                meter.steps += 1

    @property
    def _smallest(self) -> int:
        return 2 if self.layout.batch_norm else 1

    def grad(
        self,
        w: Tensor,
        batch: Batch,
        *,
        again: bool = False,
        loss: LossFn | None = None,
        forward: Forward | None = None,
    ) -> Tensor:
        """Gradient ``(..., d)`` of the mini-batch loss at ``w``, a fresh tensor.

        ``again=True`` for a further gradient on the same batch: same dropout masks, running statistics untouched, and
        the loss is not logged twice. ``loss(output, y)`` and ``forward(model, x)`` replace the task's.
        """
        meter = self.meter
        meter.backward(batch.size)
        if self.private is not None:
            g, value = self.noisy.grad(w, batch, loss is not None or forward is not None)
            if not again:
                meter.losses.append(value)
            return g
        loss, forward = self.task.parts(batch, loss, forward)
        g, value = self.model.grad(w, batch.x, target(batch), loss, again=again, forward=forward)
        self.sgd.idle = self.model.idle
        if not again:
            meter.losses.append(value)
        return g

    def descend(
        self, w: Tensor, batch: Batch, *, loss: LossFn | None = None, forward: Forward | None = None
    ) -> Tensor:
        """One plain local step, ``sgd(w, grad(w, batch, loss=loss, forward=forward))``; cheaper where nothing has to
        see the whole gradient."""
        model, sgd, meter = self.model, self.sgd, self.meter
        apart = sgd.plain or (sgd.apart and model.apart)
        if not apart or w is not model.w or self.private is not None:
            return sgd(w, self.grad(w, batch, loss=loss, forward=forward))
        meter.backward(batch.size)
        loss, forward = self.task.parts(batch, loss, forward)
        x, y = batch.x, target(batch)
        if sgd.plain:
            value = model.descend(x, y, loss, sgd.lr, self.local.weight_decay, forward)
        else:
            grads, value = model.gradients(x, y, loss, forward)
            along.step(sgd, model, grads)
        meter.losses.append(value)
        return w

    def forward(self, w: Tensor, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """``call(model, x)`` at ``w`` (d,), without gradient and without touching running statistics."""
        if self.private is not None:
            raise ClientError(refusal("job.forward"))
        self.meter.forward(size(x))
        return self.model.apply(w, x, call)

    def full_gradient(self, w: Tensor, batch_size: int = 512) -> Tensor:
        """Gradient (d,) of the mean loss over all samples at ``w``, not augmented, statistics untouched."""
        if self.private is not None:
            raise ClientError(refusal("job.full_gradient"))
        n, total = len(self.data), torch.zeros_like(w)
        for rows in torch.split(torch.arange(n), batch_size):
            total.add_(self.grad(w, self.data.read(rows), again=True), alpha=len(rows) / n)
        return total

    def evaluate(self, data: LocalData, w: Tensor | None = None, batch_size: int = 512) -> dict[str, Any]:
        """Means of loss and metrics on ``data`` of ``w`` (d,), by default the received model.

        What this client keeps of normalisation layers is put in place first.
        """
        received = self.start()
        return self.measure(data, received if w is None else w, batch_size)

    def measure(self, data: LocalData, w: Tensor, batch_size: int = 512) -> dict[str, float]:
        """The same of ``w`` (d,) with the statistics that the model has at the moment."""
        self.meter.forward(len(data))
        rows = torch.split(torch.arange(len(data)), batch_size)
        return mean_of(evaluate(self.model, w, data, self.task, rows), self._groups, self.task)

    def score(self, logits: Tensor, y: Tensor) -> dict[str, float]:
        """Means of loss and metrics of ``logits`` (n, C), however they came about, on targets ``y`` (n,)."""
        return mean_of([measured(self.task, logits, y)], self._groups, self.task)

    @property
    def _groups(self) -> np.ndarray | None:
        return class_groups(self.source.class_counts(self.client)) if self.task.by_class else None

    def report(self) -> dict[str, float]:
        """Metrics of the local training so far: mean loss over steps, steps, share of clipped steps."""
        out = {**self.metrics, **self.meter.report()}
        if "steps" in out and self.local.clip_norm is not None:
            clipped: Any = self.sgd.clipped  # on a GPU a tensor, read when the update is taken
            out["clipped"] = clipped / self.steps if self.steps else 0.0
        return out
