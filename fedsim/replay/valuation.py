"""What each of n players contributes to a utility v(S) of coalitions S. Needs nothing of the simulator.

A utility is a function of a ``frozenset`` of players 0..n-1, or a sequence of 2^n numbers, bit i of whose index says
whether player i is in the coalition. Every value is a weighted sum of differences v(S+k) - v(S): a player who never
makes a difference gets exactly 0, and players who make the same differences get the same value, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

Coalition = frozenset[int]
Utility = Callable[[Coalition], float]
Order = tuple[int, ...]
EXACT = 8  # players up to which all 2^n coalitions are looked at, unless a budget is given


def utility_of(v: Utility | Sequence[float] | np.ndarray) -> Utility:
    """``v`` as a function, if it is an array (2^n,)."""
    if callable(v):
        return v
    table = np.asarray(v, dtype=np.float64)
    return lambda coalition: float(table[sum(1 << player for player in coalition)])


def leave_one_out(v: Utility | Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """``v(N) - v(N without k)`` of each player k, (n,)."""
    u, everybody = utility_of(v), frozenset(range(n))
    return np.array([u(everybody) - u(everybody - {k}) for k in range(n)])


def shapley(v: Utility | Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """Shapley values (n,), exactly: ``sum over S without k of |S|! (n-|S|-1)!/n! (v(S+k) - v(S))``.

    They sum to v(N) - v(empty). Shapley: A Value for n-Person Games, 1953.
    """
    return _weighted(utility_of(v), n, [1 / (n * math.comb(n - 1, s)) for s in range(n)])


def banzhaf(v: Utility | Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """Banzhaf values (n,), exactly: the mean of v(S+k) - v(S) over all S without k. They need not sum to v(N)."""
    return _weighted(utility_of(v), n, [0.5 ** (n - 1)] * n)


def _weighted(u: Utility, n: int, weights: Sequence[float]) -> np.ndarray:
    """Of each player the sum of its differences, weighted by the size of the coalition that it joins."""
    found = []
    for k in range(n):
        others = [j for j in range(n) if j != k]
        coalitions = ((s, frozenset(c)) for s in range(n) for c in combinations(others, s))
        found.append(math.fsum(weights[s] * (u(c | {k}) - u(c)) for s, c in coalitions))
    return np.array(found)


def coalitions(n: int) -> Iterator[Coalition]:
    """All 2^n coalitions, small ones first."""
    return (frozenset(c) for s in range(n + 1) for c in combinations(range(n), s))


def antithetic_orders(n: int, pairs: int, rng: np.random.Generator) -> list[Order]:
    """``pairs`` random orders of the players, each followed by its reverse."""
    drawn = (tuple(rng.permutation(n).tolist()) for _ in range(pairs))
    return [order for one in drawn for order in (one, one[::-1])]


def orders_within(n: int, budget: int, rng: np.random.Generator) -> list[Order]:
    """As many antithetic pairs of orders as meet at most ``budget`` distinct non-empty coalitions.

    The first orders are those of a smaller budget under the same generator: what was computed for it counts. Below
    2 n - 1, which a pair meets, it is one order; n coalitions are needed at least.
    """
    orders, met, most = list[Order](), set[Coalition](), min(budget, 2**n - 1)
    while True:
        pair = antithetic_orders(n, 1, rng)
        wider = met | met_by(pair)
        if len(wider) > most:
            return orders or pair[:1]
        orders, met = orders + pair, wider
        if len(met) >= most:
            return orders


def met_by(orders: Sequence[Order]) -> set[Coalition]:
    """The non-empty coalitions that form while players join in these orders."""
    return {frozenset(order[: at + 1]) for order in orders for at in range(len(order))}


def shapley_by_orders(v: Utility | Sequence[float] | np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """Shapley values (n,), estimated: what each player adds on joining, averaged over ``orders``.

    Unbiased for random orders; sums to v(N) - v(empty) for any. Castro, Gomez, Tejada: Polynomial calculation of the
    Shapley value based on sampling, 2009; with reversed orders the variance is lower.
    """
    added = _added(utility_of(v), orders)
    return np.array([math.fsum(d for _, d in row) / len(row) for row in added])


def banzhaf_by_orders(v: Utility | Sequence[float] | np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """Banzhaf values (n,), estimated from the same coalitions.

    In a random order a player finds every size of coalition equally often; the size s has the weight C(n-1, s) among
    all coalitions without it, by which the differences are averaged (weights scaled to sum to 1: consistent).
    """
    added, n = _added(utility_of(v), orders), len(orders[0])
    weight = [math.comb(n - 1, s) for s in range(n)]
    return np.array(
        [math.fsum(weight[s] * d for s, d in row) / math.fsum(weight[s] for s, _ in row) for row in added]
    )


def _added(u: Utility, orders: Sequence[Order]) -> list[list[tuple[int, float]]]:
    """Of each player, in each order: how many it joins, and what it adds to them."""
    found: list[list[tuple[int, float]]] = [[] for _ in orders[0]]
    for order in orders:
        before = u(frozenset())
        for size, k in enumerate(order):
            after = u(frozenset(order[: size + 1]))
            found[k].append((size, after - before))
            before = after
    return found
