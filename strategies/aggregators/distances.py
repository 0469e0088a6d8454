"""Rules that trust updates with close neighbours. All treat updates alike: a hostile client would choose its weight.

Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent,
NeurIPS 2017 (Krum); El Mhamdi, Guerraoui, Rouault: The Hidden Vulnerability of Distributed Learning in Byzantium, ICML
2018 (Bulyan).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.coordinates import ascending, closest_mean, lower_middle, middle, sorted_columns
from strategies.aggregators.gram import near_gram, squared_distances, squared_from
from strategies.aggregators.rows import Report, Rows, RuleError, TooFewError, choice, tolerated, whole

VARIANTS = ("canonical", "garfield", "byzfl")


def krum(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    variant: str = "canonical",
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """The row of ``updates`` (n, d) with the least score, n >= 2f + 3; ``weights`` are not used.

    The score is the sum of squared distances to the n - f - 2 nearest others. ``variant``: ``garfield`` (and with it
    the flag aggregator's public code) adds plain distances to the n - f - 1 nearest, ``byzfl`` squared ones to as many;
    that library asks for n >= 2f + 1 only, and so does its variant.
    """
    return _lowest("krum", updates, weights, f, 1, variant, before, removed, report)


def multi_krum(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    m: int | None = None,
    variant: str = "canonical",
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Mean of the ``m`` rows with the least Krum scores; m = n - f - 2 by default (``byzfl``: n - f)."""
    return _lowest("multi_krum", updates, weights, f, m, variant, before, removed, report)


def bulyan(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    variant: str = "canonical",
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Per coordinate, the mean of the theta - 2f values closest to the median of theta = n - 2f picks; n >= 4f + 3.

    A pick is Krum's choice among the rows not yet picked; of equal scores the first row's counts, and with f <= 2 the
    last picks always meet two nearest neighbours with equal ones. ``variant=garfield``: theta = n - 2f - 2; scores add
    plain distances to the n - f - 2 nearest and are never updated; the k-th pick (k = 0, 1, ...) is the mean of the
    n - f - 2 - k best rows not yet left out, of which the best is then left out; of two middle values the median is the
    lower. ``weights`` are not used.
    """
    choice("bulyan", "variant", variant, VARIANTS[:2])
    k, rows = near_gram("bulyan", prepared("bulyan", updates, weights, before, f, removed, report), report)
    if not len(rows):
        return rows.zeros()
    f = tolerated("bulyan", rows, f, removed)
    if variant == "garfield":
        return _garfield_bulyan(rows, k, f)
    squared, left = squared_distances(k), list(range(len(rows)))
    picks: list[int] = []
    for _ in range(len(rows) - 2 * f):
        inside = squared[left][:, left]
        best = left[int(_scores(inside, max(1, len(left) - f - 2)).argmin())]
        picks.append(best)
        left.remove(best)
    if report is not None:
        report["selected"] = rows.names(picks)
    theta = len(picks)
    return sorted_columns(rows.keep(sorted(picks)), lambda x: closest_mean(x, middle(x), theta - 2 * f))


def monna(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    idx: int = 0,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Mean of the n - f rows of ``updates`` (n, d) nearest to row ``idx``, which is trusted and among them; n > 2f.

    Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan: Robust Collaborative Learning with Linear Gradient Overhead,
    ICML 2023. Of equally near rows the first counts. ``weights`` are not used.

    Raises:
        RuleError: there is no such row.
        TooFewError: the trusted row is not finite, or too few are.
    """
    idx = whole("monna", "idx", idx, 0, "the position of the trusted update")
    rows = prepared("monna", updates, weights, before, f, removed, report)
    if idx >= (rows.total if rows.mix is None else len(rows)) and len(rows):
        raise RuleError(f"monna: idx={idx}: there are {rows.total} updates, from 0")
    squared, rows = _from_trusted(rows, idx, report)
    if not len(rows):
        return rows.zeros()
    f = tolerated("monna", rows, f, removed)
    if rows.mix is None and idx not in rows.index:
        raise TooFewError(f"monna: the trusted update, idx={idx}, is not finite")
    own = list(rows.index).index(idx) if rows.mix is None else idx
    nearest = squared.sort(stable=True).indices.tolist()
    nearest.remove(own)
    picked = [own, *nearest[: len(rows) - f - 1]]
    return mean_of(rows, picked, report)


def _from_trusted(rows: Rows, idx: int, report: Report | None) -> tuple[Tensor, Rows]:
    """Squared distances (n,) of the finite rows to the trusted one, and those rows."""
    if rows.mix is None:
        squared = squared_from(rows, idx)
        good = torch.nonzero(torch.isfinite(squared)).flatten().tolist()
        if idx in good:  # else nothing is known of the others
            return squared[good], rows.without("monna", good, report)
    k, rows = near_gram("monna", rows, report)
    return squared_distances(k)[idx] if idx < len(rows) else k.diagonal(), rows


def mean_of(rows: Rows, picked: list[int], report: Report | None) -> Any:
    """The mean (d,) of the rows ``picked``, which ``report`` names as ``selected``."""
    if report is not None:
        report["selected"] = rows.names(picked)
    coefficients = torch.zeros(len(rows), dtype=torch.float64)
    coefficients[picked] = 1 / len(picked)
    return rows.combine(coefficients)


def _lowest(
    rule: str,
    updates: Any,
    weights: Any,
    f: int,
    m: int | None,
    variant: str,
    before: Before,
    removed: int,
    report: Report | None,
) -> Any:
    choice(rule, "variant", variant, VARIANTS)
    k, rows = near_gram(rule, prepared(rule, updates, weights, before, f, removed, report), report)
    if not len(rows):
        return rows.zeros()
    needs = f"{rule} variant=byzfl" if variant == "byzfl" else rule
    n, f = len(rows), tolerated(needs, rows, f, removed)
    if m is None:
        m = n - f if variant == "byzfl" else n - f - 2
    m = whole(rule, "m", m, 1, "the updates averaged")
    if m > n:
        raise TooFewError(f"{rule}: m={m} must be between 1 and n = {n}, the updates at hand")
    picked = _ranking(k, n - f - (2 if variant == "canonical" else 1), plain=variant == "garfield")[:m]
    return mean_of(rows, picked, report)


def _ranking(k: Tensor, nearest: int, *, plain: bool) -> list[int]:
    """Rows (n,) from the least Krum score over ``nearest`` others to the greatest; of equal ones the first comes first.

    ``plain`` distances are not squared.
    """
    distance = squared_distances(k)
    if plain:
        distance = distance.sqrt()
    order: list[int] = _scores(distance, nearest).sort(stable=True).indices.tolist()
    return order


def _scores(distance: Tensor, nearest: int) -> Tensor:
    """Sums (n,) over the ``nearest`` others of each row of ``distance`` (n, n), whose diagonal is zero."""
    return distance.sort(dim=1).values[:, 1 : nearest + 1].sum(1)


def _garfield_bulyan(rows: Rows, k: Tensor, f: int) -> Any:
    n = len(rows)
    order, theta = _ranking(k, n - f - 2, plain=True), n - 2 * f - 2
    mix = torch.zeros(theta, n, dtype=torch.float64)
    for i in range(theta):
        used = order[i : n - f - 2]
        mix[i, used] = 1 / len(used)
    mix = mix.to(rows.device)

    def column(x: Tensor) -> Tensor:
        x = ascending(mix @ x)
        return closest_mean(x, lower_middle(x), theta - 2 * f)

    return rows.fill(column(rows.read(a, b)) for a, b in rows.spans())
