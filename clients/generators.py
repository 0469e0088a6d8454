"""FRAug's two networks (Chen et al. 2023, figure 2; layers as in the authors' code)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.task.vectors import FlatModel


class Generator(nn.Module):
    """Client-agnostic embeddings: noise z (B, L) and labels y (B,) to ``v`` (B, D) >= 0.

    ``Linear(L + C, D), BN, ReLU, Linear(D, D), BN, ReLU`` on the noise and the one-hot label.
    """

    def __init__(self, dim: int, latent: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fc0, self.bn0 = nn.Linear(latent + num_classes, dim), nn.BatchNorm1d(dim)
        self.fc1, self.bn1 = nn.Linear(dim, dim), nn.BatchNorm1d(dim)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """``v`` (B, D)."""
        hidden = F.relu(self.bn0(self.fc0(_labelled(z, y, self.num_classes))))
        return F.relu(self.bn1(self.fc1(hidden)))


class RTNet(nn.Module):
    """Representation transformation of one client: ``anchor + residual(v, y)``; v, anchor (B, D), y (B,).

    The residual is ``Linear(D + C, L), BN, ReLU, Linear(L, D)`` and, with ``final_bn``, BN.
    """

    def __init__(self, dim: int, latent: int, num_classes: int, final_bn: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fc0, self.bn0 = nn.Linear(dim + num_classes, latent), nn.BatchNorm1d(latent)
        self.fc1 = nn.Linear(latent, dim)
        self.bn1: nn.Module = nn.BatchNorm1d(dim) if final_bn else nn.Identity()

    def forward(self, v: Tensor, anchor: Tensor, y: Tensor) -> Tensor:
        """A client-specific embedding (B, D)."""
        hidden = F.relu(self.bn0(self.fc0(_labelled(v, y, self.num_classes))))
        return anchor + cast(Tensor, self.bn1(self.fc1(hidden)))


def drawn(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype, device: str = "cpu") -> FlatModel:
    """``build()`` under a seed of its own; the global generator is left alone.

    Its vectors have no padding: they travel beside the model's, whose layout alone is known everywhere.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return FlatModel(build(), dtype, device, aligned=False)


@lru_cache(maxsize=4)
def networks(
    dim: int, latent: int, num_classes: int, final_bn: bool, dtype: torch.dtype, device: str
) -> tuple[FlatModel, FlatModel]:
    """Resident generator and RTNet of this process; whoever uses them loads their weights first."""
    builds = (
        partial(Generator, dim, latent, num_classes),
        partial(RTNet, dim, latent, num_classes, final_bn),
    )
    return drawn(builds[0], 0, dtype, device), drawn(builds[1], 0, dtype, device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the modes of before after."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _labelled(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    return torch.cat((x, F.one_hot(y, num_classes).to(x.dtype)), dim=1)
