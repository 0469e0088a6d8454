"""Samples made without data, by a network that is trained against others' models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.fixed import BATCH_NORM

KINDS, LAYERS = ("auto", "conv", "mlp"), {"conv": 4, "mlp": 2}
Criterion = Callable[[Tensor], Tensor]  # samples in [0, 1] (B, *shape) -> what is to be small


class Painter(nn.Module):
    """Noise z (B, L) to images (B, ch, H, W) in [0, 1]: a linear layer to a quarter of the size, then twice a
    doubling and a 3x3 convolution, with BatchNorm and leaky ReLU between (the generator of DENSE and Co-Boosting)."""

    def __init__(self, noise: int, shape: Sequence[int], width: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.sides = tuple(math.ceil(side / 4) for side in (self.height, self.width))
        self.wide = 2 * width
        self.linear = nn.Linear(noise, self.wide * self.sides[0] * self.sides[1])
        self.norm = nn.BatchNorm2d(self.wide)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((self.wide, self.wide, width, channels))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (self.wide, width))

    def forward(self, z: Tensor) -> Tensor:
        """Images in [0, 1]."""
        x = self.norm(self.linear(z).view(len(z), self.wide, *self.sides))
        sizes = (math.ceil(self.height / 2), math.ceil(self.width / 2)), (self.height, self.width)
        for conv, norm, size in zip(self.convs, self.norms, sizes, strict=False):
            x = F.leaky_relu_(norm(conv(F.interpolate(x, size=size))), 0.2)
        return torch.sigmoid(self.convs[2](x))


class Sketcher(nn.Module):
    """Noise z (B, L) to samples (B, *shape) in [0, 1] by one hidden layer of ``width`` units with BatchNorm."""

    def __init__(self, noise: int, shape: Sequence[int], width: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.hidden, self.norm = nn.Linear(noise, width), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        """Samples in [0, 1]."""
        return torch.sigmoid(self.out(F.relu(self.norm(self.hidden(z))))).view(-1, *self.shape)


def layers_of(kind: str, shape: Sequence[int]) -> tuple[str, int]:
    """What ``kind`` of generator makes samples of ``shape``, and how many layers it has.

    Raises:
        ConfigError: for ``conv`` where these are no images.
    """
    if kind == "conv" and len(shape) != 3:
        raise ConfigError(
            f"strategy.generator=conv: it makes images, and samples are of shape {tuple(shape)}; type "
            "strategy.generator=mlp"
        )
    kind = ("conv" if len(shape) == 3 else "mlp") if kind == "auto" else kind
    return kind, LAYERS[kind]


def check_stds(std: Any) -> bool:
    """Whether ``std`` is a deviation, or a list of such."""
    each = list(std) if isinstance(std, Sequence) and not isinstance(std, str) else [std]
    numbers = [v for v in each if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == len(each) > 0 and all(0 <= v < math.inf for v in numbers)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Its BatchNorm layers that keep statistics."""
    return [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.running_mean is not None]


def generator(
    kind: str,
    noise: int,
    shape: Sequence[int],
    width: int,
    std: float | Sequence[float],
    rng: torch.Generator,
) -> nn.Module:
    """A network drawn afresh by ``rng``: weights N(0, ``std``), one entry for all layers or one each; scales of
    BatchNorm N(1, 0.02); biases 0. ``kind`` ``auto``: ``conv`` for images, else ``mlp``."""
    kind, _ = layers_of(kind, shape)
    net = Painter(noise, shape, width) if kind == "conv" else Sketcher(noise, shape, width)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    each = [float(std)] * len(layers) if isinstance(std, int | float) else [float(s) for s in std]
    with torch.no_grad():
        for layer, deviation in zip(layers, each, strict=True):
            layer.weight.normal_(0, deviation, generator=rng)
            if layer.bias is not None:
                layer.bias.zero_()
        for norm in (m for m in net.modules() if isinstance(m, BATCH_NORM)):
            norm.weight.normal_(1, 0.02, generator=rng)
            norm.bias.zero_()
    return net


def synthesised(
    net: nn.Module, z: Tensor, criterion: Criterion, steps: int, lr: float, bound: float | None
) -> tuple[Tensor, float]:
    """Samples (B, *shape) in [0, 1] of the step at which ``criterion`` was lowest, before that step's update, and how
    low: Adam with betas (0.5, 0.999) over the parameters of ``net`` and the noise ``z`` (B, L), gradients no longer
    than ``bound``."""
    z = z.clone().requires_grad_()
    variables = [*net.parameters(), z]
    optimiser = torch.optim.Adam(variables, lr=lr, betas=(0.5, 0.999))
    best, low = None, math.inf
    for _ in range(steps):
        x = net(z)
        value = criterion(x)
        found = value.item()
        if best is None or found < low:
            best, low = x.detach().clone(), found
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        if bound is not None:
            nn.utils.clip_grad_norm_(variables, bound)
        optimiser.step()
    assert best is not None
    return best, low


class Statistics:
    """How far inputs of the BatchNorm layers of ``models`` are from their running statistics, while ``watching``."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._layers = [batch_norms(model) for model in models]
        self._found: list[Tensor] = []

    @property
    def everywhere(self) -> bool:
        """Whether every model has such layers."""
        return bool(self._layers) and all(self._layers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, forward passes are looked at."""
        layers = [layer for model in self._layers for layer in model]
        hooks = [layer.register_forward_pre_hook(self._look) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self) -> Tensor:
        """``L_BN``: the mean over models of ``sum_l norm(mean_l - running mean_l) + norm(var_l - running var_l)``, of
        the passes since the last call."""
        found, self._found = self._found, []
        return torch.stack(found).sum() / len(self._layers) if found else torch.zeros(())

    def _look(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        x, kept = given[0], layer
        axes = [d for d in range(x.dim()) if d != 1]
        mean, var = x.mean(dim=axes), x.var(dim=axes, unbiased=False)
        assert isinstance(kept.running_mean, Tensor) and isinstance(kept.running_var, Tensor)
        self._found.append((mean - kept.running_mean).norm() + (var - kept.running_var).norm())
