"""Aggregation rules: pure functions ``(updates (n, d), weights=None) -> (d,)``, usable without the simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Aggregator = Callable[..., Tensor]


def mean(updates: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the rows of ``updates`` (n, d); equal weights by default. McMahan et al. 2017, Alg. 1."""
    n = len(updates)
    if n == 0:
        raise ValueError("mean of no updates; expected at least one row")
    w = torch.ones(n, dtype=updates.dtype) if weights is None else torch.as_tensor(weights).to(updates.dtype)
    if w.shape != (n,) or not bool((w >= 0).all()) or not float(w.sum()) > 0:
        raise ValueError(f"weights must be {n} non-negative numbers with a positive sum, got {w.tolist()}")
    return w @ updates / w.sum()


def is_mean(aggregator: Any) -> bool:
    """Whether ``aggregator`` is the plain mean, which workers may sum up without keeping single updates."""
    while isinstance(aggregator, partial):
        aggregator = aggregator.func
    return aggregator is mean
