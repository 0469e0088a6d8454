"""Operations on the values of images, for whole batches: what PIL's ImageOps and ImageEnhance do.

Images are floats (b, C, H, W) in [0, top]; with ``whole`` they stand for whole numbers, and results are rounded as PIL
rounds them. An enhancement mixes an image with a plain one, ``plain + factor (x - plain)``, factors (b, 1, 1, 1);
factor 1 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.data.views.base import ImageView, uniforms

LEVELS = 256  # of a byte


@dataclass(frozen=True)
class Pixels:
    """How the numbers of an image are read: the largest of them, and whether they are whole."""

    top: float
    whole: bool

    @staticmethod
    def of(x: Tensor, high: float | None) -> Pixels:
        """Bytes reach 255 and floats 1, unless ``high`` says another number."""
        whole = not x.is_floating_point()
        return Pixels(float(high if high is not None else 255 if whole else 1), whole)

    def opened(self, x: Tensor) -> Tensor:
        """A copy of ``x`` to compute with."""
        return x.to(x.dtype if x.dtype == torch.float64 else torch.float32, copy=True)

    def closed(self, values: Tensor, like: Tensor) -> Tensor:
        """Values in the type that the images are stored in."""
        return values.to(like.dtype)

    def within(self, values: Tensor) -> Tensor:
        """Values within the range, whole ones rounded down (in place)."""
        values.clamp_(0, self.top)
        return values.floor_() if self.whole else values

    def mixed(self, x: Tensor, plain: Tensor | float, factor: Tensor) -> Tensor:
        """``plain + factor (x - plain)``."""
        return self.within((x - plain).mul_(factor).add_(plain))


Enhancement = Callable[[Tensor, Tensor, Pixels], Tensor]  # (x, factor, pixels) -> x


def grey(x: Tensor, pixels: Pixels) -> Tensor:
    """Brightness (b, 1, H, W): ITU-R 601 of three channels, else the mean over channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    if not pixels.whole:
        return 0.299 * red + 0.587 * green + 0.114 * blue
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()


def brightness(x: Tensor, factor: Tensor, pixels: Pixels) -> Tensor:
    """Towards black."""
    return pixels.mixed(x, 0.0, factor)


def colour(x: Tensor, factor: Tensor, pixels: Pixels) -> Tensor:
    """Towards its grey image; images of one channel have no colour."""
    return x if x.shape[1] == 1 else pixels.mixed(x, grey(x, pixels), factor)


def contrast(x: Tensor, factor: Tensor, pixels: Pixels) -> Tensor:
    """Towards the mean brightness."""
    mean = grey(x, pixels).double().mean((1, 2, 3), keepdim=True)
    mean = (mean + 0.5).floor_() if pixels.whole else mean
    return pixels.mixed(x, mean.to(x.dtype), factor)


def sharpness(x: Tensor, factor: Tensor, pixels: Pixels) -> Tensor:
    """Towards the mean over 3x3 pixels, the middle one counted five times; the border stays."""
    height, width = x.shape[-2:]
    if min(height, width) <= 2:
        return x
    smooth = x[..., 1:-1, 1:-1] * 4
    for i in range(3):
        for j in range(3):
            smooth += x[..., i : height - 2 + i, j : width - 2 + j]
    smooth /= 13
    plain = x.clone()
    plain[..., 1:-1, 1:-1] = (smooth + 0.5).floor_() if pixels.whole else smooth
    return pixels.mixed(x, plain, factor)


def posterize(x: Tensor, bits: int, pixels: Pixels) -> Tensor:
    """The ``bits`` highest bits of each value; eight change nothing."""
    if bits >= 8:
        return x
    size, levels = pixels.top + pixels.whole, 2**bits
    return pixels.within((x * (levels / size)).floor_().clamp_(max=levels - 1).mul_(size / levels))


def solarize(x: Tensor, share: float, pixels: Pixels) -> Tensor:
    """Values from ``share`` of the largest on are inverted."""
    return torch.where(x >= pixels.top * share, pixels.top - x, x)


def autocontrast(x: Tensor, pixels: Pixels) -> Tensor:
    """Each channel stretched to the whole range; one of a single value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    wide = high > low
    stretched = ((x - low) * pixels.top).div_(torch.where(wide, high - low, 1))
    return torch.where(wide, pixels.within(stretched), x)


def equalize(x: Tensor, pixels: Pixels) -> Tensor:
    """Each channel with its values spread evenly, over 256 levels; one of a single value stays."""
    flat = x.flatten(2).flatten(0, 1)
    levels = (flat * ((LEVELS - 0.001) / pixels.top)).long().clamp_(0, LEVELS - 1)
    rows = torch.arange(len(flat), device=x.device).unsqueeze(1) * LEVELS
    counts = torch.bincount((levels + rows).flatten(), minlength=len(flat) * LEVELS).view(-1, LEVELS)
    last = counts.gather(1, levels.amax(1, keepdim=True))
    step = (counts.sum(1, keepdim=True) - last) // (LEVELS - 1)
    table = (step // 2 + counts.cumsum(1) - counts) // step.clamp(min=1)
    spread = table.clamp_(max=LEVELS - 1).gather(1, levels).to(x.dtype).mul_(pixels.top / (LEVELS - 1))
    spread = (spread + 0.5).floor_() if pixels.whole else spread
    return torch.where(step > 0, spread, flat).view(x.shape)


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of standard deviation ``sigma`` (b,) pixels, each image its own; borders are mirrored."""
    count, channels, height, width = x.shape
    reach = min(max(1, round(0.05 * min(height, width))), min(height, width) - 1)
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * (at / sigma.to(x.dtype).view(-1, 1)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    out = x.reshape(1, count * channels, height, width)
    for shape, pad in (((1, -1), (reach, reach, 0, 0)), ((-1, 1), (0, 0, reach, reach))):
        kernel = weight.view(count * channels, 1, *shape)
        out = F.conv2d(F.pad(out, pad, mode="reflect"), kernel, groups=count * channels)
    return out.view(x.shape)


@dataclass(frozen=True)
class Colour(ImageView):
    """Brightness, contrast and saturation with factors 1 - s to 1 + s, then perhaps grey, then perhaps blurred.

    The jitter comes with probability ``p``, the other two with ``grey`` and ``blur`` (sigma 0.1 to 2 pixels). Nothing
    moves, so it goes with boxes. After Chen et al. 2020, "A simple framework for contrastive learning", appendix A,
    without the change of hue. ``high``: the largest value, by default 255 of bytes and 1 of floats.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    high: float | None = None

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws seven uniforms a sample."""
        u = uniforms(len(x), 7, generator, x.device)
        pixels = Pixels.of(x, self.high)
        out = pixels.opened(x)
        strengths = (self.brightness, self.contrast, self.saturation)
        jitters: tuple[Enhancement, ...] = (brightness, contrast, colour)
        for i, (jitter, strength) in enumerate(zip(jitters, strengths, strict=True)):
            factor = torch.where(u[:, 0] < self.p, 1 + strength * (2 * u[:, 1 + i] - 1), 1)
            out = jitter(out, factor.clamp_(min=0).to(out.dtype).view(-1, 1, 1, 1), pixels)
        out = torch.where((u[:, 4] < self.grey).view(-1, 1, 1, 1), grey(out, pixels), out)
        at = (u[:, 5] < self.blur).nonzero().flatten()
        if len(at):
            out[at] = blurred(out[at], 0.1 + 1.9 * u[at, 6])
        return pixels.closed(out.round_() if pixels.whole else out, x)


@dataclass(frozen=True)
class Cutout(ImageView):
    """A square of ``share`` of the shorter side, around a pixel drawn evenly, in one shade.

    DeVries, Taylor 2017, "Improved regularization of convolutional neural networks with cutout". ``shade`` is a share
    of the largest value; the square may reach over the border. Boxes below it stay.
    """

    share: float = 0.5
    shade: float = 0.5
    high: float | None = None

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws two uniforms a sample: the middle's row and column."""
        return self.hidden(x, uniforms(len(x), 2, generator, x.device))

    def hidden(self, x: Tensor, u: Tensor) -> Tensor:
        """``x`` without the squares that the uniforms ``u`` (B, 2) say."""
        height, width = x.shape[-2:]
        side = round(self.share * min(height, width))
        gone = [
            _within((u[:, i] * length).long() - side // 2, side, length)
            for i, length in enumerate((height, width))
        ]
        shade = self.shade * Pixels.of(x, self.high).top
        covered = gone[0].view(-1, 1, height, 1) & gone[1].view(-1, 1, 1, width)
        return torch.where(covered, torch.tensor(shade, dtype=torch.float64, device=x.device).to(x.dtype), x)


def _within(start: Tensor, side: int, length: int) -> Tensor:
    """Which of ``length`` places lie in ``start .. start + side - 1`` (B, length)."""
    at = torch.arange(length, device=start.device)
    return (at >= start.unsqueeze(1)) & (at < start.unsqueeze(1) + side)
