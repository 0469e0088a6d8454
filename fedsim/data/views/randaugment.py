"""RandAugment (Cubuk et al. 2020) on whole batches: every sample draws its own operations.

The fourteen operations and their ranges are those of torchvision's ``RandAugment`` with 31 magnitudes: geometric ones
are one resampling of all samples that drew one, the others are computed for the samples that drew them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.data.views.base import ImageView, uniforms
from fedsim.data.views.geometry import resampled, unmoved
from fedsim.data.views.photometric import (
    Cutout,
    Enhancement,
    Pixels,
    autocontrast,
    brightness,
    colour,
    contrast,
    equalize,
    posterize,
    sharpness,
    solarize,
)
from fedsim.errors import ConfigError

MAGNITUDES = 31  # 0 to 30
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCEMENTS: dict[str, Enhancement] = {
    "brightness": brightness,
    "colour": colour,
    "contrast": contrast,
    "sharpness": sharpness,
}
OPERATIONS = (
    "identity",
    *GEOMETRIC,
    *ENHANCEMENTS,
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)


def geometric_move(name: str, strength: Tensor, size: tuple[int, int]) -> Tensor:
    """The moves (B, 2, 3) of an operation with ``strength`` in [-1, 1] (B,) of its range, on images of size (H, W).

    Shears reach 0.3 about the upper left corner, translations 150/331 of the side in whole pixels, turns 30 degrees
    (positive: counterclockwise) about the middle.
    """
    height, width = size
    back = unmoved(len(strength), strength.device)
    if name == "shear_x":
        back[:, 0, 1] = 0.3 * strength
    elif name == "shear_y":
        back[:, 1, 0] = 0.3 * strength
    elif name == "translate_x":
        back[:, 0, 2] = -(150 / 331 * width * strength).trunc()
    elif name == "translate_y":
        back[:, 1, 2] = -(150 / 331 * height * strength).trunc()
    else:
        angle = math.radians(30) * strength
        cos, sin = angle.cos(), angle.sin()
        back[:, 0, 0], back[:, 0, 1], back[:, 1, 0], back[:, 1, 1] = cos, -sin, sin, cos
        middle = torch.tensor([width / 2, height / 2], dtype=back.dtype, device=back.device)
        back[:, :, 2] = middle - back[:, :, :2] @ middle
    return back


def photometric(name: str, x: Tensor, strength: Tensor, pixels: Pixels) -> Tensor:
    """An operation on the values of images (b, C, H, W), with ``strength`` in [-1, 1] (b,) of its range.

    Enhancements have factors 1 - 0.9 to 1 + 0.9; posterizing leaves 8 to 4 bits, solarizing starts at the largest
    value down to 0: these two, as the rest, know no sign.
    """
    if name in ENHANCEMENTS:
        factor = (1 + 0.9 * strength).to(x.dtype).view(-1, 1, 1, 1)
        return ENHANCEMENTS[name](x, factor, pixels)
    level = abs(float(strength[0])) if len(strength) else 0.0  # one for all samples
    if name == "posterize":
        return posterize(x, 8 - round(4 * level), pixels)
    if name == "solarize":
        return solarize(x, 1 - level, pixels)
    return autocontrast(x, pixels) if name == "autocontrast" else equalize(x, pixels)


@dataclass(frozen=True)
class RandAugment(ImageView):
    """``n`` operations a sample, each drawn evenly from ``OPERATIONS``, of magnitude ``m`` (0 to 30) and either sign.

    Args:
        bilinear: how pixels move; else the nearest.
        high: the largest value, by default 255 of bytes and 1 of floats.
        visible: share of a box that must be left, or it is dropped.
    """

    n: int = 2
    m: int = 9
    bilinear: bool = False
    high: float | None = None
    visible: float = 0.25

    def __post_init__(self) -> None:
        if self.n < 0 or not 0 <= self.m < MAGNITUDES:
            raise ConfigError(
                f"view: RandAugment with n={self.n}, m={self.m}; give n of at least 0 and m from 0 to {MAGNITUDES - 1}"
            )

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws 2 n uniforms a sample: operations, then signs."""
        return self.moves(x, generator)[0]

    def moves(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The same, with the moves of each of the ``n`` rounds."""
        return self.operated(x, uniforms(len(x), 2 * self.n, generator, x.device))

    def operated(self, x: Tensor, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x`` after the operations that the uniforms ``u`` (B, 2 n) say, and the moves of each round."""
        chosen = (u[:, : self.n] * len(OPERATIONS)).long()
        strengths = torch.where(u[:, self.n :] <= 0.5, -1.0, 1.0) * (self.m / (MAGNITUDES - 1))
        pixels = Pixels.of(x, self.high)
        out, backs = pixels.opened(x), list[Tensor]()
        for codes, strength in zip(chosen.unbind(1), strengths.double().unbind(1), strict=True):
            backs.append(self._round(out, codes, strength, pixels))
        return pixels.closed(out, x), backs

    def _round(self, out: Tensor, codes: Tensor, strength: Tensor, pixels: Pixels) -> Tensor:
        """One operation for every sample of ``out``, in place; the moves (B, 2, 3)."""
        back = unmoved(len(out), out.device)
        size = (out.shape[-2], out.shape[-1])
        for code in sorted(set(codes.tolist())):
            name, at = OPERATIONS[code], (codes == code).nonzero().flatten()
            if name in GEOMETRIC:
                back[at] = geometric_move(name, strength[at], size)
            elif name != "identity":
                out[at] = photometric(name, out[at], strength[at], pixels)
        moving = ((codes >= 1) & (codes <= len(GEOMETRIC))).nonzero().flatten()
        if len(moving):
            shown = resampled(out[moving], back[moving], bilinear=self.bilinear)
            out[moving] = shown.round_() if pixels.whole and self.bilinear else shown
        return back


@dataclass(frozen=True)
class Strong(ImageView):
    """RandAugment, then a square cut out: what FixMatch calls strong (Sohn et al. 2020, section 2.3).

    ``cutout`` is the square's side as a share of the shorter side, 0 for none; the rest as in ``RandAugment``.
    """

    n: int = 2
    m: int = 10
    cutout: float = 0.5
    bilinear: bool = False
    high: float | None = None
    visible: float = 0.25

    def __post_init__(self) -> None:
        self._operations()

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws 2 n + 2 uniforms a sample: those of RandAugment, then those of Cutout."""
        return self.moves(x, generator)[0]

    def moves(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The same, with the moves of each round."""
        u = uniforms(len(x), 2 * self.n + 2, generator, x.device)
        out, backs = self._operations().operated(x, u[:, :-2])
        return (Cutout(self.cutout, high=self.high).hidden(out, u[:, -2:]) if self.cutout else out), backs

    def _operations(self) -> RandAugment:
        return RandAugment(self.n, self.m, self.bilinear, self.high, self.visible)
