"""Augmentation of training batches: whole batches at a time, in storage type, before normalising.

Every transform is ``(batch (B, C, H, W), generator) -> (B, C, H, W)`` of the same type and never changes its
input. All draws come from the generator, one per sample whatever the outcome, so a key fixes the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.data.dataset import Augment


@dataclass(frozen=True)
class Flip:
    """Mirror each image left to right with probability ``p``."""

    p: float = 0.5

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` uniforms."""
        chosen = _uniform(len(x), generator, x.device) < self.p
        return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)


@dataclass(frozen=True)
class PadCrop:
    """Pad each image with ``padding`` zero pixels on all sides; cut a random window of the old size.

    With probability ``1 - p`` an image stays as it is. Zero is zero in raw space (black), as in He et al.
    2016, "Deep residual learning for image recognition", section 4.2.
    """

    padding: int = 4
    p: float = 1.0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` uniforms, then ``2 B`` offsets (rows, columns)."""
        pad, (height, width) = self.padding, x.shape[-2:]
        chosen = _uniform(len(x), generator, x.device) < self.p
        drawn = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=generator, device=generator.device)
        top, left = torch.where(chosen, drawn.to(x.device), pad)
        windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(x), device=x.device), :, top, left]


@dataclass(frozen=True)
class Compose:
    """Apply ``transforms`` from left to right."""

    transforms: Sequence[Augment]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each transform draws from the same generator in turn."""
        for transform in self.transforms:
            x = transform(x, generator)
        return x


def flip_and_crop() -> Compose:
    """The usual augmentation of small images: mirror with probability 1/2, then pad by 4 and crop."""
    return Compose((Flip(), PadCrop()))


def _uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device).to(device)
