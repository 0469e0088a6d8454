"""Rules that average the n - f updates which lie closest together. All treat updates alike: a hostile client would
choose its weight.

Which those are is found exactly, and of equally good subsets the first in lexicographic order is taken, as by going
through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.distances import mean_of
from strategies.aggregators.gram import near_gram, squared_distances
from strategies.aggregators.rows import Report, RuleError, tolerated

SUBSETS = 1_000_000  # that SMEA goes through at most, which takes about a minute
AT_ONCE = 1 << 20  # numbers of their matrices held at once


def mda(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Minimum diameter averaging: the mean of the n - f rows of ``updates`` (n, d) whose largest distance is least; n >
    2f. ``weights`` are not used.

    Rousseeuw 1985; El Mhamdi, Guerraoui, Guirguis, Hoang, Rouault: Genuinely Distributed Byzantine Machine Learning,
    PODC 2020. Rows have a diameter of at most t where leaving out f of them leaves no pair farther apart than t: a
    vertex cover, searched for in time that grows with f and not with the number of subsets.
    """
    k, rows = near_gram("mda", prepared("mda", updates, weights, before, f, removed, report), report)
    if not len(rows):
        return rows.zeros()
    f = tolerated("mda", rows, f, removed)
    return mean_of(rows, _least_diameter(squared_distances(k), f), report)


def smea(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Smallest maximum eigenvalue averaging: the mean of the n - f rows of ``updates`` (n, d) whose covariance has the
    least top eigenvalue; n > 2f. ``weights`` are not used.

    Allouah, Guerraoui, Gupta, Pinot, Stephan: On the Privacy-Robustness-Utility Trilemma in Distributed Learning, ICML
    2023. All subsets are gone through, on the n x n inner products.

    Raises:
        RuleError: there are more than ``SUBSETS``.
    """
    k, rows = near_gram("smea", prepared("smea", updates, weights, before, f, removed, report), report)
    if not len(rows):
        return rows.zeros()
    f = tolerated("smea", rows, f, removed)
    if refused := too_many(len(rows), f):
        raise RuleError(refused)
    return mean_of(rows, _least_spread(k, f), report)


def too_many(n: int, f: int) -> str:
    """Why SMEA refuses n updates of which f are wrong; empty if it does not."""
    count = comb(n, f)
    if count <= SUBSETS:
        return ""
    return f"smea: f={f} of {n} updates are {count} subsets to go through, more than {SUBSETS}"


def _least_diameter(squared: Tensor, f: int) -> list[int]:
    """The first n - f rows, ascending, of the least diameter by ``squared`` distances (n, n)."""
    n = len(squared)
    levels = torch.unique(squared[*torch.triu_indices(n, n, 1)]) if n > 1 else squared.new_zeros(1)
    low, high = 0, len(levels) - 1  # the least level at which f rows cover all pairs farther apart
    while low < high:
        middle = (low + high) // 2
        if _covered(_conflicts(squared, float(levels[middle])), f):
            high = middle
        else:
            low = middle + 1
    apart = _conflicts(squared, float(levels[low])) if f else [0] * n
    kept: list[int] = []
    there, left = (1 << n) - 1, f
    for i in range(n):
        if not there >> i & 1:
            continue
        gone = apart[i] & there  # what cannot stay if i does
        if len(kept) < n - f and gone.bit_count() <= left:
            rest = there & ~gone & ~(1 << i)
            if _covered(
                [a & rest if rest >> j & 1 else 0 for j, a in enumerate(apart)], left - gone.bit_count()
            ):
                kept.append(i)
                there, left = there & ~gone, left - gone.bit_count()
                continue
        there &= ~(1 << i)
        left -= 1
    return kept


def _conflicts(squared: Tensor, level: float) -> list[int]:
    """For each row, the rows farther from it than ``level``, as bits."""
    return [sum(1 << j for j, far in enumerate(row) if far) for row in (squared > level).tolist()]


def _covered(graph: list[int], budget: int) -> bool:
    """Whether at most ``budget`` vertices touch all edges of ``graph`` (neighbours as bits).

    The vertex of the highest degree is either in the cover, or all its neighbours are.
    """
    degrees = [a.bit_count() for a in graph]
    most = max(degrees, default=0)
    if most == 0:
        return True
    if budget <= 0 or sum(degrees) > 2 * most * budget:
        return False
    v = degrees.index(most)
    if _covered(_without(graph, 1 << v), budget - 1):
        return True
    return most > 1 and most <= budget and _covered(_without(graph, graph[v]), budget - most)


def _without(graph: list[int], gone: int) -> list[int]:
    return [0 if gone >> i & 1 else a & ~gone for i, a in enumerate(graph)]


def _least_spread(k: Tensor, f: int) -> list[int]:
    """The first n - f rows, ascending, whose covariance has the least top eigenvalue, by inner products (n, n)."""
    n = len(k)
    best, least = list(range(n - f)), float("inf")
    for subsets in _batches(combinations(range(n), n - f), max(1, AT_ONCE // (n - f) ** 2)):
        at = torch.tensor(subsets)
        inside = k[at[:, :, None], at[:, None, :]]
        inside -= inside.mean(1, keepdim=True)
        inside -= inside.mean(2, keepdim=True)
        top = torch.linalg.eigvalsh(inside)[:, -1]
        place = int(top.argmin())
        if float(top[place]) < least:
            best, least = list(subsets[place]), float(top[place])
    return best


def _batches(items: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    while found := list(islice(items, size)):
        yield found
