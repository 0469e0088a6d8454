"""Nonlinear augmentations: images whose pixels move along a map of the plane. Drawn like those of ``augment``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from fedsim.errors import DataError, check_setting

_check = partial(check_setting, "augment")
STEPS = 50  # Runge-Kutta steps of the flow


@dataclass(frozen=True)
class CatMap:
    """Arnold's cat map: the pixel at (i, j) of a square image goes to (2i + j, i + j), modulo its side.

    ``iterations`` times, for each image with probability ``p``. A bijection, so no pixel is lost.
    """

    iterations: int = 1
    p: float = 1.0

    def __post_init__(self) -> None:
        _check(self.iterations >= 1, "iterations", self.iterations, "must be at least 1")
        _check(0 <= self.p <= 1, "p", self.p, "must be in [0, 1]")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` uniforms."""
        if x.dim() != 4 or x.shape[-1] != x.shape[-2]:
            raise DataError(f"CatMap: expected square images (B, C, N, N), got shape {tuple(x.shape)}")
        source = _cat_source(x.shape[-1], self.iterations).to(x.device)
        return _pick(x, source[None], torch.zeros(len(x), dtype=torch.long), _chosen(x, self.p, generator))


@dataclass(frozen=True)
class LotkaVolterra:
    """Pixels move along the predator-prey flow ``x' = a x - b x y``, ``y' = d x y - c y`` for a short time.

    Coordinates are pixels from the image's centre, the first axis is the prey; a pixel shows where its own path ends,
    or zero if that lies outside. Each image takes one of ``times``. Almasi et al., ICLR 2024: a, b, c, d = 2/3, 4/3, 1,
    1 and ten times from 0.001 to 0.01.
    """

    times: Sequence[float] = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01)
    p: float = 1.0
    rates: Sequence[float] = (2 / 3, 4 / 3, 1.0, 1.0)

    def __post_init__(self) -> None:
        _check(0 <= self.p <= 1, "p", self.p, "must be in [0, 1]")
        _check(len(self.times) > 0, "times", list(self.times), "must not be empty")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws ``B`` times, then ``B`` uniforms."""
        if x.dim() != 4:
            raise DataError(f"LotkaVolterra: expected images (B, C, H, W), got shape {tuple(x.shape)}")
        which = torch.randint(len(self.times), (len(x),), generator=generator, device=generator.device)
        shape = (x.shape[-2], x.shape[-1])
        source = torch.stack([_flow_source(*shape, float(t), tuple(self.rates)) for t in self.times])
        return _pick(x, source.to(x.device), which.cpu(), _chosen(x, self.p, generator))


def _chosen(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(len(x), generator=generator, device=generator.device) < p).cpu()


def _pick(x: Tensor, source: Tensor, which: Tensor, chosen: Tensor) -> Tensor:
    """Pixels of ``x`` (B, C, H, W) from flat positions ``source[which]`` (B, H W), -1: zero, in the chosen images."""
    flat = torch.cat([x.flatten(2), x.new_zeros(x.shape[0], x.shape[1], 1)], dim=2)
    index = source[which.to(x.device)]
    index = torch.where(index < 0, flat.shape[2] - 1, index)
    moved = flat.gather(2, index[:, None, :].expand(-1, x.shape[1], -1)).view_as(x)
    return torch.where(chosen.to(x.device).view(-1, 1, 1, 1), moved, x)


@lru_cache(maxsize=16)
def _cat_source(side: int, iterations: int) -> Tensor:
    """For each pixel (N N,), the flat position it comes from."""
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for _ in range(iterations):
        i, j = (2 * i + j) % side, (i + j) % side
    source = torch.empty(side * side, dtype=torch.long)
    source[(i * side + j).flatten()] = torch.arange(side * side)
    return source


@lru_cache(maxsize=64)
def _flow_source(height: int, width: int, time: float, rates: tuple[float, ...]) -> Tensor:
    """For each pixel (H W,), the flat position its path ends in, -1 outside."""
    a, b, c, d = rates
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    z = torch.stack([height / 2 - i, width / 2 - j]).double()

    def velocity(z: Tensor) -> Tensor:
        x, y = z
        return torch.stack([a * x - b * x * y, d * x * y - c * y])

    h = time / STEPS
    for _ in range(STEPS):
        k1 = velocity(z)
        k2 = velocity(z + h / 2 * k1)
        k3 = velocity(z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(z + h * k3))
    row, column = (height / 2 - z[0]).floor().long(), (width / 2 - z[1]).floor().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, -1).flatten()
