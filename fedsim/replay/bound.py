"""A lower bound on the epsilon of differential privacy, from guesses who was in. Needs nothing of the simulator.

Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit
from scipy.stats import binom

LEVEL = 0.05


def p_value(eps: float, canaries: int, guesses: int, right: int, delta: float = 0.0) -> float:
    """Bound on the probability of at least ``right`` of ``guesses`` being right under (eps, delta)-DP.

    ``P[Bin(r, q) >= v] + 2 m delta alpha`` with ``q = e^eps / (1 + e^eps)`` and
    ``alpha = max_{1<=i<=v} P[v - i <= Bin(r, q) < v] / i``.
    """
    q = float(expit(eps))
    tail = float(binom.sf(right - 1, guesses, q))
    if not delta or right < 1:
        return tail
    i = np.arange(1, right + 1)
    below = binom.cdf(right - 1, guesses, q) - binom.cdf(right - 1 - i, guesses, q)
    return tail + 2 * canaries * delta * float((below / i).max())


def epsilon_lower_bound(
    canaries: int, guesses: int, right: int, delta: float = 0.0, level: float = LEVEL
) -> float:
    """The largest eps with ``p_value < level``; 0 if even eps = 0 is not refuted: nothing is shown.

    Args:
        canaries: m, each in by a fair coin.
        guesses: r, fixed before the scores were seen.
        right: v, how many of them were right.
        delta: of the claim.
        level: probability with which the bound may exceed a true epsilon.

    Raises:
        ValueError: for numbers that cannot be.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            f"right={right}, guesses={guesses}, canaries={canaries}: must not fall in this order"
        )
    if not (0 <= delta < 1 and 0 < level < 1):
        raise ValueError(f"delta={delta} must be in [0, 1), level={level} in (0, 1)")

    def refuted(eps: float) -> bool:
        return p_value(eps, canaries, guesses, right, delta) < level

    if not guesses or not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def right_guesses(scores: Sequence[float] | np.ndarray, present: Sequence[bool] | np.ndarray, r: int) -> int:
    """How many of ``r`` guesses are right: "in" for the r/2 highest of ``scores`` (m,), "out" for the r/2 lowest.

    Ties go by the number of the canary, which says nothing of ``present`` (m,). A score that is no number counts as
    the lowest.

    Raises:
        ValueError: if r is odd, or more than there are canaries.
    """
    s, there = np.asarray(scores, dtype=np.float64), np.asarray(present, dtype=bool)
    if r % 2 or not 0 < r <= len(s):
        raise ValueError(f"{r} guesses of {len(s)} canaries: must be an even number of at most as many")
    order = np.argsort(-np.where(np.isnan(s), -math.inf, s), kind="stable")
    return int(there[order[: r // 2]].sum() + (~there[order[len(s) - r // 2 :]]).sum())
