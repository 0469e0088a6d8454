"""A task: the model, its loss and what is measured; independent of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.task.copies import Portable
from fedsim.task.habits import UNKNOWN, Habits

LossFn = Callable[[Tensor, Tensor], Tensor]  # (model output, target) -> scalar, mean over the batch
MetricFn = Callable[[Tensor, Tensor], Tensor]  # (model output, target) -> scalar, mean over the batch


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """Share of samples whose guess is the target; output (B, C), or one logit (B, 1) or (B,), y (B,)."""
    return (guesses(output) == y).double().mean()


def guesses(output: Tensor) -> Tensor:
    """Class (B,) of each sample: the largest of logits (B, C); of one logit (B, 1) or (B,), 1 where it is above 0."""
    if output.dim() == 2 and output.shape[1] > 1:
        return output.argmax(dim=-1)
    return (output.reshape(-1) > 0).long()


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy; output (B, C), y (B,) int64."""
    return F.cross_entropy(output, y)


@dataclass(frozen=True)
class Task:
    """The learning problem.

    ``model`` is the prototype whose initial parameters start the run. ``metrics`` are reported besides the loss; by
    default accuracy where targets are class labels that the output tells apart. ``by_class``: number of classes if they
    are counted one by one too, else 0. ``num_classes``: of the targets, 0 where they are none; ``None``: any integers.
    """

    model: nn.Module
    loss: LossFn = cross_entropy
    metrics: Mapping[str, MetricFn] | None = None
    by_class: int = 0
    example: Tensor | None = None  # two inputs, for whoever needs shapes
    num_classes: int | None = None
    habits: Habits = UNKNOWN  # what the model was seen to do in a trial

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": Portable.packed(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"]
        vars(self).update(state, model=model.unpacked() if isinstance(model, Portable) else model)

    def measure(self, output: Tensor, y: Tensor) -> dict[str, Any]:
        """Sums over the batch of loss and metrics, as Python floats (add and divide by the sample count).

        With ``by_class``, also ``by_class`` (3, C): right ones, samples and predictions of each class.
        """
        n = len(y)
        metrics = self.metrics
        if metrics is None:
            metrics = {"accuracy": accuracy} if self._guessed(output, y) else {}
        out: dict[str, Any] = {"loss": float(self.loss(output, y)) * n}
        out |= {name: float(fn(output, y)) * n for name, fn in metrics.items()}
        if self.by_class:
            guess = guesses(output)
            counted = [torch.bincount(t, minlength=self.by_class) for t in (y[guess == y], y, guess)]
            out["by_class"] = torch.stack([t[: self.by_class] for t in counted]).cpu()
        return out

    def _guessed(self, output: Any, y: Tensor) -> bool:
        """Whether ``y`` (B,) are class labels, and ``output`` has a logit for each, or one for two classes."""
        if y.is_floating_point() or y.dim() != 1 or not isinstance(output, Tensor) or output.dim() > 2:
            return False
        logits = output.shape[1] if output.dim() == 2 else 1
        told_apart = max(logits, 2)
        if self.num_classes is None:
            return output.dim() == 2
        return 0 < self.num_classes <= told_apart
