"""Augmentation of training batches: whole batches at a time, in storage type, before normalising.

Every transform is ``(batch (B, C, H, W), generator) -> (B, C, H, W)`` of the same type and never changes its
input. All draws come from the generator, one per sample whatever the outcome, so a key fixes the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import Augment, onto
from fedsim.data.views.base import seen
from fedsim.data.views.geometry import mirrored, moved, translations, windows


@dataclass(frozen=True)
class Flip:
    """Mirror each image left to right with probability ``p``."""

    p: float = 0.5

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` uniforms."""
        chosen = _uniform(len(x), generator, x.device) < self.p
        return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)

    def with_targets(self, x: Tensor, y: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The same, with boxes or maps."""
        state = generator.get_state()
        back = mirrored(_uniform(len(x), generator, x.device) < self.p, x.shape[-1])
        generator.set_state(state)
        return self(x, generator), moved(y, back, (x.shape[-2], x.shape[-1]), 0.0)


@dataclass(frozen=True)
class PadCrop:
    """Pad each image with ``padding`` zero pixels on all sides; cut a random window of the old size.

    With probability ``1 - p`` an image stays as it is. Zero is zero in raw space (black), as in He et al.
    2016, "Deep residual learning for image recognition", section 4.2.
    """

    padding: int = 4
    p: float = 1.0
    visible: float = 0.25

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` uniforms, then ``2 B`` offsets (rows, columns)."""
        return windows(x, self.padding, *self._offsets(x, generator))

    def with_targets(self, x: Tensor, y: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The same, with boxes or maps; a box of which less than ``visible`` is left is dropped."""
        top, left = self._offsets(x, generator)
        back = translations(self.padding - left, self.padding - top)
        shown = windows(x, self.padding, top, left)
        return shown, moved(y, back, (x.shape[-2], x.shape[-1]), self.visible)

    def _offsets(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where each window begins in the padded images: rows and columns (B,)."""
        chosen = _uniform(len(x), generator, x.device) < self.p
        shape = (2, len(x))
        drawn = torch.randint(0, 2 * self.padding + 1, shape, generator=generator, device=generator.device)
        top, left = torch.where(chosen, onto(drawn, x.device), self.padding)
        return top, left


@dataclass(frozen=True)
class Compose:
    """Apply ``transforms`` from left to right."""

    transforms: Sequence[Augment]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each transform draws from the same generator in turn."""
        for transform in self.transforms:
            x = transform(x, generator)
        return x

    def with_targets(self, x: Any, y: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """The same, each with the targets that lie in the images."""
        for transform in self.transforms:
            x, y = seen(transform, x, y, generator)
        return x, y


def flip_and_crop() -> Compose:
    """The usual augmentation of small images: mirror with probability 1/2, then pad by 4 and crop."""
    return Compose((Flip(), PadCrop()))


def _uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return onto(torch.rand(count, generator=generator, device=generator.device), device)
