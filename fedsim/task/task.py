"""A task: the model, its loss and what is measured; independent of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.local import Batch
from fedsim.data.trees import Tree
from fedsim.models.split import logits_of
from fedsim.task.copies import Portable
from fedsim.task.habits import UNKNOWN, Habits
from fedsim.task.losses import Forward, LossFn, WholeLoss, call, cross_entropy, itself, takes_model
from fedsim.task.metrics import MetricFn, Ratio, confusion_of, summed

__all__ = ["LossFn", "MetricFn", "Task", "accuracy", "cross_entropy", "guesses"]


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """Share of samples whose guess is the target; output (B, C), or one logit (B, 1) or (B,), y (B,)."""
    return (guesses(output) == y).double().mean()


def guesses(output: Tensor) -> Tensor:
    """Class (B,) of each sample: the largest of logits (B, C); of one logit (B, 1) or (B,), 1 where it is above 0."""
    if output.dim() == 2 and output.shape[1] > 1:
        return output.argmax(dim=-1)
    return (output.reshape(-1) > 0).long()


@dataclass(frozen=True)
class Task:
    """The learning problem.

    ``model`` is the prototype whose initial parameters start the run. ``loss`` is the mean over a batch, of the model's
    output and the targets, or a ``WholeLoss`` of model and batch. ``metrics`` are reported besides the loss; by default
    accuracy where targets are class labels that the output tells apart. ``by_class``: number of classes if they are
    counted one by one too, else 0; ``confusion``: if it is counted what they are taken for. ``num_classes``:
    of the targets, 0 where they are none; ``None``: any integers.
    ``forward`` takes inputs through the model; by default a mapping is passed by keyword, a tuple by position.
    ``count(y)`` says how many units (tokens) the loss of a batch is the mean of, where those are not its samples, and
    ``derived`` makes further numbers of the measured ones.
    """

    model: nn.Module
    loss: LossFn = cross_entropy
    metrics: Mapping[str, MetricFn] | None = None
    by_class: int = 0
    confusion: int = 0
    example: Tree = None  # two inputs, for whoever needs shapes
    num_classes: int | None = None
    habits: Habits = UNKNOWN  # what the model was seen to do in a trial
    forward: Forward | None = None
    count: Callable[[Any], Any] | None = None
    derived: Mapping[str, Callable[[Mapping[str, Any]], float]] | None = None
    weighed: Callable[[Any], float] | None = (
        None  # (y) -> what a batch's loss is divided by, instead of ``count``
    )
    besides: bool = False  # accuracy is measured besides ``metrics``, where it can be

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": Portable.packed(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"]
        vars(self).update(state, model=model.unpacked() if isinstance(model, Portable) else model)

    def parts(
        self, batch: Batch, loss: LossFn | None = None, forward: Forward | None = None
    ) -> tuple[LossFn, Forward | None]:
        """Loss and forward pass for ``batch``, where a local rule may have its own; no pass: ``module(x)`` will do."""
        if loss is None:
            loss = self.loss
        elif takes_model(loss):
            loss = WholeLoss(loss)
        if type(loss) is WholeLoss:
            return loss.of(batch), itself
        if forward is None:
            forward = self.forward or (None if isinstance(batch.x, Tensor) else call)
        return loss, forward

    def output(self, module: nn.Module, x: Tree) -> Any:
        """What the model makes of inputs ``x``."""
        return call(module, x) if self.forward is None else self.forward(module, x)

    def value(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss () of ``batch``, the mean over its samples."""
        loss, forward = self.parts(batch)
        return loss((forward or call)(module, batch.x), target(batch))

    def measured(self, module: nn.Module, batch: Batch) -> dict[str, Any]:
        """What ``batch`` gives to add up (``fedsim.task.evaluation.mean_of``): loss, metrics, and its ``samples``."""
        n, y = batch.size, target(batch)
        if type(self.loss) is WholeLoss:
            loss = self.loss.of(batch)(module, None)
            output = self.output(module, batch.x) if self.metrics else None
        else:
            output = self.output(module, batch.x)
            loss = self.loss(output, y)
        return {"samples": float(n), **self._sums(loss, output, y, n)}

    def measure(self, output: Any, y: Any) -> dict[str, Any]:
        """The same, without ``samples``, of an output that is there already.

        With ``by_class``, also ``by_class`` (3, C): right ones, samples and predictions of each class; with
        ``confusion``, ``taken_for``, a matrix (C, C + 1) of classes by guesses.
        """
        return self._sums(self.loss(output, y), output, y, len(y))

    def units(self, y: Any, samples: int) -> float:
        """What a batch weighs in a mean of losses: its samples, or what ``count`` says."""
        return float(samples if self.count is None else self.count(y))

    def _sums(self, loss: Tensor, output: Any, y: Any, n: int) -> dict[str, Any]:
        metrics, out = self.metrics, dict[str, Any]()
        if metrics is None or self.besides:
            own: dict[str, MetricFn] = {"accuracy": accuracy} if self._guessed(output, y) else {}
            metrics = own | dict(metrics or {})
        units_of = self.weighed or self.count
        if units_of is None:
            out["loss"] = float(loss) * n
        else:
            units = float(units_of(y))
            out["loss"] = Ratio(float(loss) * units if units else 0.0, units)
        shown = logits_of(output)
        for name, metric in metrics.items():
            out[name] = summed(name, metric(shown, y), n)
        if self.by_class:
            guess = guesses(shown)
            counted = [torch.bincount(t, minlength=self.by_class) for t in (y[guess == y], y, guess)]
            out["by_class"] = torch.stack([t[: self.by_class] for t in counted]).cpu()
        if self.confusion:
            out["taken_for"] = confusion_of(y, guesses(shown), self.confusion)
        return out

    def _guessed(self, output: Any, y: Any) -> bool:
        """Whether ``y`` (B,) are class labels, and ``output`` has a logit for each, or one for two classes."""
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != 1:
            return False
        output = logits_of(output)
        if not isinstance(output, Tensor) or output.dim() > 2:
            return False
        logits = output.shape[1] if output.dim() == 2 else 1
        distinguished = max(logits, 2)
        if self.num_classes is None:
            return output.dim() == 2
        return 0 < self.num_classes <= distinguished


def target(batch: Batch) -> Any:
    """The targets: ``y``, or the ``labels`` among the inputs of a model that takes them."""
    y = batch.y
    if y is None and isinstance(batch.x, Mapping):
        return batch.x.get("labels")
    return y
