"""Intersection over union of segmentations, as counts that add up."""

from __future__ import annotations

import torch
from torch import Tensor


class Overlap:
    """Mean IoU over the classes that occur, from counts of pixels: the same for any batches and workers.

    Called for a batch of logits (B, C, ...) and targets (B, ...), gives an ``OverlapCount``; the classes' counts over a
    whole set make the mean, not means of batches.
    """

    def __init__(self, num_classes: int, ignored: int):
        self.num_classes, self.ignored = num_classes, ignored

    def __call__(self, output: Tensor, y: Tensor) -> OverlapCount:
        """Pixels (3, C) of both, of the guess and of the target."""
        y = y.long()
        kept = y != self.ignored
        guess, y = output.argmax(1)[kept], y[kept]
        counted = [torch.bincount(t, minlength=self.num_classes) for t in (y[guess == y], guess, y)]
        return OverlapCount(torch.stack([t[: self.num_classes] for t in counted]).cpu())


class OverlapCount:
    """Pixels (3, C) of intersection, guess and target."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __add__(self, other: object) -> OverlapCount:
        """Of both."""
        return OverlapCount(self.pixels + other.pixels) if isinstance(other, OverlapCount) else self

    __radd__ = __add__

    def value(self) -> float:
        """Mean over the classes in guess or target; NaN of nothing."""
        both, guess, there = self.pixels.double()
        union = guess + there - both
        return float((both / union)[union > 0].mean())
