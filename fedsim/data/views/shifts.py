"""Views that move images as wholes: mirrored, shifted, scaled, turned, or four of them in one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedsim.data.views.base import ImageView, is_image, uniforms
from fedsim.data.views.geometry import (
    corners,
    map_moved,
    mirrored,
    resampled,
    settled,
    translations,
    unmoved,
    windows,
)
from fedsim.errors import ConfigError


@dataclass(frozen=True)
class Weak(ImageView):
    """Mirrored left to right with probability ``flip``, then shifted by up to ``padding`` pixels into black.

    ``padding`` is an eighth of the height where it is ``None`` (4 of 32). What are no images stay as they are.
    """

    flip: float = 0.5
    padding: int | None = None
    visible: float = 0.25

    def suits(self, x: Tensor) -> bool:
        """Anything: what is no image stays."""
        return True

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws three uniforms a sample: mirrored or not, row and column of the window."""
        if not is_image(x):
            return x
        chosen, pad, top, left = self._drawn(x, generator)
        return windows(torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x), pad, top, left)

    def moves(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The same, with the moves."""
        state = generator.get_state()
        chosen, pad, top, left = self._drawn(x, generator)
        generator.set_state(state)
        backs = [mirrored(chosen, x.shape[-1]), translations(pad - left, pad - top)]
        return self.show(x, generator), backs

    def _drawn(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, int, Tensor, Tensor]:
        pad = x.shape[-2] // 8 if self.padding is None else self.padding
        u = uniforms(len(x), 3, generator, x.device)
        top, left = (u[:, 1:] * (2 * pad + 1)).long().unbind(1)
        return u[:, 0] < self.flip, pad, top, left


@dataclass(frozen=True)
class Affine(ImageView):
    """Mirrored with probability ``flip``, scaled, turned and shifted at once; what comes from outside is black.

    Shifts reach ``shift`` of a side in each direction, ``scale`` is drawn evenly from its two bounds (above 1:
    enlarged), turns reach ``degrees`` to both sides.
    """

    flip: float = 0.5
    shift: float = 0.1
    scale: tuple[float, float] = (0.8, 1.25)
    degrees: float = 0.0
    bilinear: bool = True
    visible: float = 0.25

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws five uniforms a sample: mirrored or not, shifts right and down, scale, turn."""
        return self.moves(x, generator)[0]

    def moves(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The same, with the moves."""
        height, width = x.shape[-2:]
        u = uniforms(len(x), 5, generator, x.device)
        sides = torch.tensor([width, height], dtype=u.dtype, device=u.device)
        shift = (2 * u[:, 1:3] - 1) * self.shift * sides
        smallest, largest = self.scale
        scale = smallest + (largest - smallest) * u[:, 3]
        angle = math.radians(self.degrees) * (2 * u[:, 4] - 1)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        back = unmoved(len(x), x.device)
        back[:, 0, 0], back[:, 0, 1], back[:, 1, 0], back[:, 1, 1] = cos, -sin, sin, cos
        back[u[:, 0] < self.flip, 0] *= -1
        middle = sides / 2
        back[:, :, 2] = middle - (back[:, :, :2] * (middle + shift).unsqueeze(1)).sum(-1)
        return resampled(x, back, bilinear=self.bilinear), [back]


class Quarter(NamedTuple):
    """A quarter of each mosaic: which sample (B,) it shows, moved how (B, 2, 3), and where it lies (B, 4)."""

    row: Tensor
    back: Tensor
    frame: Tensor  # left, top, right, bottom


@dataclass(frozen=True)
class Mosaic(ImageView):
    """Four images in one, as in Bochkovskiy et al. 2020, "YOLOv4", section 3.3, with probability ``p`` a sample.

    They meet in a point drawn from the middle part of the image, ``margin`` of a side away from its border; the sample
    itself lies up left, three others of the batch, drawn evenly, around it. Each is shown in ``scale``, as far as its
    quarter reaches from that point. With M boxes a sample there are 4 M afterwards, and whatever else the targets hold
    of each box comes along. What a sample becomes depends on the batch.
    """

    p: float = 1.0
    scale: float = 0.5
    margin: float = 0.25
    bilinear: bool = True
    visible: float = 0.25

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws six uniforms a sample: whether, the point (x, y), three others."""
        return self._joined(x, *self._drawn(x, generator))

    def with_targets(self, x: Any, y: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """One tensor of images with boxes (``fedsim.data.views.geometry.settled``), or with a map of their pixels."""
        boxed = isinstance(y, Mapping) and "boxes" in y
        if not isinstance(x, Tensor) or not (boxed or isinstance(y, Tensor)):
            raise ConfigError(
                "view: Mosaic joins one tensor of images, with boxes or with one map of their pixels"
            )
        self.check(x)
        drawn = self._drawn(x, generator)
        return self._joined(x, *drawn), self._boxes(x, y, *drawn) if boxed else self._joined(y, *drawn)

    def _boxes(
        self, x: Tensor, y: Mapping[str, Any], quarters: list[Quarter], chosen: Tensor
    ) -> dict[str, Any]:
        """The targets of all four, one after the other; of samples that stay single, their own and none."""
        parts = []
        for row, back, frame in quarters:
            part = tree_map(lambda t, row=row: t[row], dict(y))
            parts.append(settled(part, corners(part["boxes"], back), frame.unsqueeze(1), self.visible))
        count = y["labels"].shape[1]
        for part in parts[1:]:  # of samples that stay single
            part["labels"] = torch.where(chosen.unsqueeze(1), part["labels"], -1)
            part["boxes"] = torch.where(part["labels"][..., None] >= 0, part["boxes"], 0)
        own = settled(y, y["boxes"].double(), (0, 0, x.shape[-1], x.shape[-2]), 0.0)
        for key in ("boxes", "labels"):
            kept = chosen.view(-1, *(1,) * (own[key].dim() - 1))
            parts[0][key] = torch.where(kept, parts[0][key], own[key])
        return {
            k: torch.cat([part[k] for part in parts], 1)
            if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == count
            else v
            for k, v in y.items()
        }

    def _drawn(self, x: Tensor, generator: torch.Generator) -> tuple[list[Quarter], Tensor]:
        """The quarters, row by row, and who becomes a mosaic (B,)."""
        height, width = x.shape[-2:]
        count = len(x)
        u = uniforms(count, 6, generator, x.device)
        spread = 1 - 2 * self.margin
        across = ((self.margin + spread * u[:, 1]) * width).round()
        along = ((self.margin + spread * u[:, 2]) * height).round()
        rows = iter([torch.arange(count, device=x.device), *(u[:, 3:] * count).long().unbind(1)])
        quarters, zero = list[Quarter](), torch.zeros_like(across)
        for down in (False, True):
            for right in (False, True):
                back = unmoved(count, x.device) / self.scale
                back[:, 0, 2] = -across / self.scale + (0 if right else width)
                back[:, 1, 2] = -along / self.scale + (0 if down else height)
                ends = (
                    across if right else zero,
                    along if down else zero,
                    zero + width if right else across,
                    zero + height if down else along,
                )
                quarters.append(Quarter(next(rows), back, torch.stack(ends, dim=1)))
        return quarters, u[:, 0] < self.p

    def _joined(self, x: Tensor, quarters: list[Quarter], chosen: Tensor) -> Tensor:
        """The four quarters of images, or of maps (B, H, W) or (B, C, H, W) by nearest pixels."""
        right = torch.arange(x.shape[-1], device=x.device)
        down = torch.arange(x.shape[-2], device=x.device).unsqueeze(1)
        ends, out = (-1, *(1,) * (x.dim() - 1)), x
        for row, back, frame in quarters:
            shown = (
                resampled(x[row], back, bilinear=self.bilinear) if is_image(x) else map_moved(x[row], back)
            )
            left, top, end, bottom = (edge.view(ends) for edge in frame.unbind(1))
            inside = (right >= left) & (right < end) & (down >= top) & (down < bottom)
            out = torch.where(inside & chosen.view(ends), shown, out)
        return out
