"""Layers with low-rank adapters for tests, without a library."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen layer with adapters, by default of rank 2 and scale 2."""

    def __init__(self, size_in: int, size_out: int, rank: int = 2, scaling: float = 2.0):
        super().__init__()
        self.base = nn.Linear(size_in, size_out).requires_grad_(False)
        self.lora_A = nn.Parameter((2 * torch.rand(rank, size_in) - 1) / size_in**0.5)
        self.lora_B = nn.Parameter(torch.zeros(size_out, rank))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return out


def adapted(*first: nn.Module, features: int = 4) -> nn.Module:
    """Two such layers behind ``first``: ``features`` inputs, three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*first, LoRALinear(features, 4), nn.Tanh(), LoRALinear(4, 3))
