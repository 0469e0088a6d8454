"""Noise that is correlated over rounds, for runs without amplification: ``C^-1 Z`` in the place of Z.

C (T, T) is lower triangular Toeplitz; releasing ``C G + Z`` is releasing ``G + C^-1 Z`` (matrix mechanism). ``banded``:
the square root of the prefix-sum matrix (Henzinger, Upadhyay 2023), cut to a band (Choquette-Choo et al. 2023).
``tree``: noise per node of a binary tree (Kairouz et al.: Practical and Private (Deep) Learning without Sampling or
Shuffling, ICML 2021), for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ArgumentError


def column(rounds: int, band: int) -> np.ndarray:
    """First column (T,) of C: ``c_0 = 1, c_k = c_{k-1} (2k - 1) / (2k)``, and 0 from ``band`` on."""
    if not band >= 1 or rounds < 1:
        raise ArgumentError(f"rounds={rounds}, band={band}: expected both at least 1")
    c = np.zeros(rounds)
    c[0] = 1.0
    for k in range(1, min(band, rounds)):
        c[k] = c[k - 1] * (2 * k - 1) / (2 * k)
    return c


def sensitivity(c: np.ndarray, apart: int) -> float:
    """Length of what one client adds to ``C G``, in clip bounds, if it takes part every ``apart`` rounds.

    Columns that far apart are orthogonal where the band is no wider; else ``sqrt(sum_ij (C'C)_ij)`` over all rounds of
    the earliest pattern, which is the largest since no entry of C is negative and they fall along the column.
    """
    rounds = len(c)
    total = np.zeros(rounds)
    for t in range(0, rounds, apart):
        total[t:] += c[: rounds - t]
    return math.sqrt(float(total @ total))


def correlated(noise: Tensor, c: Sequence[float] | np.ndarray) -> Tensor:
    """``C^-1`` applied to ``noise`` (T, d): ``y_t = z_t - sum_{k>=1} c_k y_{t-k}``."""
    out: list[Tensor] = []
    for z in noise:
        out.append(next_noise(z, out, c))
    return torch.stack(out)


def next_noise(z: Tensor, before: Sequence[Tensor], c: Sequence[float] | np.ndarray) -> Tensor:
    """``y_t`` (d,) from fresh noise ``z`` (d,) and the y's of earlier rounds, the newest last."""
    y = z.clone()
    for k, past in enumerate(reversed(before), start=1):
        if k >= len(c) or not c[k]:
            break
        y = y - float(c[k]) * past
    return y


def levels(rounds: int) -> int:
    """Nodes of the tree that one release enters: ``ceil(log2 T) + 1``."""
    return math.ceil(math.log2(rounds)) + 1 if rounds > 1 else 1


def nodes(t: int) -> list[tuple[int, int]]:
    """The tree's nodes (level, place) whose sum is the prefix of the first ``t`` rounds, from left to right."""
    out, start = list[tuple[int, int]](), 0
    for level in range(t.bit_length() - 1, -1, -1):
        if t >> level & 1:
            out.append((level, start >> level))
            start += 1 << level
    return out
