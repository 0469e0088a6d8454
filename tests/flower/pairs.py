"""Samples of several inputs, as a node and the server read them, a model of them, and one with BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.dataset import Dataset, Samples


def read(path: str, kind: str) -> Dataset:
    """Signals (n, 4) and notes (n, 3) of a ward, which ``path`` ends with the number of: a list, a tuple or a tree."""

    def made(seed: int, n: int) -> Samples:
        rng = torch.Generator().manual_seed(seed)
        a, b = torch.randn(n, 4, generator=rng), torch.randn(n, 3, generator=rng)
        x: Any = {"list": [a, b], "tuple": (a, b), "tree": (a, [b, a])}[kind]
        return Samples(x, (a.sum(1) > 0).long())

    return Dataset(made(int(path[-1]), 24), made(9, 12), classes=("calm", "wild"))


class Pairs(nn.Module):
    """Takes them as they were stored."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.signals, self.notes = kind, nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, x: Any) -> Tensor:
        assert type(x) is (list if self.kind == "list" else tuple)
        a, b = x if self.kind != "tree" else (x[0], x[1][0])
        out: Tensor = self.signals(a) + self.notes(b)
        return out


class Normed(nn.Module):
    """A linear model behind BatchNorm."""

    def __init__(self, input_shape: Sequence[int], num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(input_shape))
        self.head = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x.flatten(1)))
        return out
