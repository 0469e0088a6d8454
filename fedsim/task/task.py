"""A task: the model, its loss and what is measured; independent of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFn = Callable[[Tensor, Tensor], Tensor]  # (model output, target) -> scalar, mean over the batch
MetricFn = Callable[[Tensor, Tensor], Tensor]  # (model output, target) -> scalar, mean over the batch


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """Share of samples whose largest logit is the target; output (B, C), y (B,)."""
    return (output.argmax(dim=-1) == y).double().mean()


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy; output (B, C), y (B,) int64."""
    return F.cross_entropy(output, y)


@dataclass(frozen=True)
class Task:
    """The learning problem.

    ``model`` is the prototype whose initial parameters start the run. ``metrics`` are reported besides the loss; by
    default accuracy where targets are class labels. ``by_class``: number of classes if they are counted one by one
    too, else 0.
    """

    model: nn.Module
    loss: LossFn = cross_entropy
    metrics: Mapping[str, MetricFn] | None = None
    by_class: int = 0
    example: Tensor | None = None  # two inputs, for whoever needs shapes

    def measure(self, output: Tensor, y: Tensor) -> dict[str, Any]:
        """Sums over the batch of loss and metrics, as Python floats (add and divide by the sample count).

        With ``by_class``, also ``by_class`` (3, C): right ones, samples and predictions of each class.
        """
        n = len(y)
        metrics = self.metrics
        if metrics is None:
            labels = (
                not y.is_floating_point()
                and y.dim() == 1
                and isinstance(output, Tensor)
                and output.dim() == 2
            )
            metrics = {"accuracy": accuracy} if labels else {}
        out: dict[str, Any] = {"loss": float(self.loss(output, y)) * n}
        out |= {name: float(fn(output, y)) * n for name, fn in metrics.items()}
        if self.by_class:
            guess = output.argmax(dim=-1)
            counted = [torch.bincount(t, minlength=self.by_class) for t in (y[guess == y], y, guess)]
            out["by_class"] = torch.stack([t[: self.by_class] for t in counted]).cpu()
        return out
