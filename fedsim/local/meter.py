"""What a job has cost and done so far: steps, samples, passes through the model, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Meter:
    """Counts of one job.

    ``steps`` and ``samples``: mini-batch steps done, samples seen in them. ``gradients``: samples taken through a
    forward and a backward pass; ``forwards``: through a forward pass alone; both times ``effort``, what the client's
    model costs as a share of the whole model. ``losses``: one () per step, not yet read back from the device.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.samples = 0
        self.gradients: float = 0
        self.forwards: float = 0
        self.effort: float = 1
        self.losses: list[Tensor] = []

    @property
    def first_loss(self) -> float:
        """The loss of the first step; 0 before it."""
        return float(self.losses[0]) if self.losses else 0.0

    def backward(self, samples: int) -> None:
        """Count a gradient of ``samples`` samples."""
        self.gradients += self.effort * samples

    def forward(self, samples: int) -> None:
        """Count a forward pass of ``samples`` samples without a gradient."""
        self.forwards += self.effort * samples

    def restart(self) -> None:
        """Losses and steps of a second phase start anew; samples and passes add up."""
        self.losses, self.steps = [], 0

    def report(self) -> dict[str, float]:
        """``train_loss``, the mean over steps, and ``steps``; nothing before the first step.

        On a GPU the mean is a tensor () there, which stands for a number and is read when the update is taken.
        """
        if not self.losses:
            return {}
        mean: Any
        if self.losses[0].is_cpu:
            mean = sum(map(Tensor.item, self.losses)) / len(self.losses)
        else:
            mean = torch.stack(self.losses).double().mean()
        return {"train_loss": mean, "steps": float(self.steps)}
