"""Shapley values by least squares over some of the coalitions. Needs nothing of the simulator.

Lundberg, Lee: A Unified Approach to Interpreting Model Predictions, NeurIPS 2017 (Kernel SHAP): the values are the
additive game that is nearest to v, where a coalition of s of n players weighs (n-1) / (C(n, s) s (n-s)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from fedsim.replay.valuation import Coalition, Utility, utility_of

REPEATS = 100  # draws per coalition that is looked for, after which fewer are taken


def weighted_coalitions(n: int, budget: int, rng: np.random.Generator) -> dict[Coalition, float]:
    """At most ``budget`` distinct coalitions of n >= 2 players with their weights, that of all players (0) among them.

    Sizes whose coalitions all fit, the smallest and largest first, are taken whole; of the others coalitions are drawn
    by their weight, each with its complement, and share what their sizes weigh by how often they were drawn.
    """
    found: dict[Coalition, float] = {frozenset(range(n)): 0.0}
    left = min(budget, 2**n - 1) - 1
    sizes = [{s, n - s} for s in range(1, n // 2 + 1)]
    while sizes and left >= (count := sum(math.comb(n, s) for s in sizes[0])):
        share = _weight(n, sizes[0]) / sum(_weight(n, both) for both in sizes)
        if left * share < count and left < sum(math.comb(n, s) for both in sizes for s in both):
            break
        both = sizes.pop(0)
        for s in both:
            found |= dict.fromkeys(
                map(frozenset, combinations(range(n), s)), _weight(n, {s}) / math.comb(n, s)
            )
        left -= count
    return found | (_drawn(n, sizes, left, rng) if sizes else {})


def _weight(n: int, sizes: set[int]) -> float:
    """Of all coalitions of these sizes together."""
    return sum((n - 1) / (s * (n - s)) for s in sizes)


def _drawn(
    n: int, sizes: Sequence[set[int]], budget: int, rng: np.random.Generator
) -> dict[Coalition, float]:
    weights = np.array([_weight(n, both) for both in sizes])
    drawn: dict[Coalition, int] = {}
    for _ in range(REPEATS * budget):
        s = min(sizes[rng.choice(len(sizes), p=weights / weights.sum())])
        first = frozenset(rng.choice(n, s, replace=False).tolist())
        pair = (first, frozenset(range(n)) - first)
        if len({*drawn, *pair}) > budget:
            break
        for coalition in pair:
            drawn[coalition] = drawn.get(coalition, 0) + 1
    total = sum(drawn.values())
    return {coalition: float(weights.sum()) * count / total for coalition, count in drawn.items()}


def shapley_by_kernel(
    v: Utility | Sequence[float] | np.ndarray, n: int, weights: Mapping[Coalition, float]
) -> np.ndarray:
    """Shapley values (n,), estimated from the coalitions in ``weights``; exact where these are all there are.

    They sum to v(N) - v(empty): the last player's is what the others leave.
    """
    u, everybody = utility_of(v), frozenset(range(n))
    empty = u(frozenset())
    total = u(everybody) - empty
    coalitions = [c for c in weights if c != everybody]
    member = np.array([[k in c for k in range(n)] for c in coalitions], dtype=np.float64)
    target = np.array([u(c) - empty for c in coalitions]) - member[:, -1] * total
    root = np.sqrt([weights[c] for c in coalitions])
    rows = (member[:, :-1] - member[:, -1:]) * root[:, None]
    most, *_ = np.linalg.lstsq(rows, target * root, rcond=None)
    return np.append(most, total - most.sum())
