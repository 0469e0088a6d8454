"""Means: plain, clipped, and the geometric median."""

from __future__ import annotations

from typing import Any

import torch

from strategies.aggregators.gram import finite_gram, median, norms
from strategies.aggregators.rows import Report, Rows, RuleError


def mean(updates: Any, weights: Any = None, *, report: Report | None = None) -> Any:
    """Weighted mean of the rows of ``updates`` (n, d); equal weights by default. McMahan et al. 2017, Alg. 1."""
    rows = Rows.of("mean", updates, weights)
    out = rows.combine(rows.weights / rows.weights.sum())
    if bool(torch.isfinite(torch.as_tensor(out)).all()):
        rows.without("mean", range(len(rows)), report)
        return out
    rows = rows.without("mean", rows.finite(), report)
    total = float(rows.weights.sum())
    return rows.combine(rows.weights / total) if total > 0 else rows.zeros()


def norm_clip(updates: Any, weights: Any = None, *, report: Report | None = None) -> Any:
    """Weighted mean of ``u_i min(1, c / |u_i|)`` (d,), where c is the median of the norms."""
    rows = Rows.of("norm_clip", updates, weights)
    size = norms(rows)
    good = torch.nonzero(torch.isfinite(size)).flatten().tolist()
    rows, size = rows.without("norm_clip", good, report), size[good]
    if not len(rows) or not float(rows.weights.sum()) > 0:
        return rows.zeros()
    bound = median(size)
    factor = torch.where(size > bound, bound / size, 1.0)
    if report is not None:
        report |= {"bound": bound, "clipped": int((size > bound).sum())}
    return rows.combine(factor * rows.weights / rows.weights.sum())


def geometric_median(
    updates: Any,
    weights: Any = None,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-10,
    nu: float = 1e-6,
    report: Report | None = None,
) -> Any:
    """The point (d,) with the least weighted sum of distances to the rows of ``updates`` (n, d).

    Smoothed Weiszfeld steps ``z <- sum_i b_i u_i / sum_i b_i``, ``b_i = w_i / max(nu, |z - u_i|)``, from the mean
    (Pillutla, Kakade, Harchaoui: Robust Aggregation for Federated Learning, 2022, Alg. 2; they take 3 to 5 steps,
    here as many as it takes until z moves by less than ``tolerance`` times the median distance). A step works on
    coefficients of the rows and costs n^2.
    """
    if iterations < 1 or not nu > 0 or tolerance < 0:
        raise RuleError(
            f"geometric_median: expected iterations >= 1, tolerance >= 0, nu > 0; got {iterations}, {tolerance}, {nu}"
        )
    k, rows = finite_gram("geometric_median", Rows.of("geometric_median", updates, weights), report)
    if not len(rows) or not float(rows.weights.sum()) > 0:
        return rows.zeros()
    w, size = rows.weights / rows.weights.sum(), k.diagonal()
    c, step = w, 0
    for step in range(1, iterations + 1):  # noqa: B007 - reported
        kc = k @ c
        distance = (size - 2 * kc + c @ kc).clamp(min=0).sqrt()
        b = w / distance.clamp(min=nu)
        new = b / b.sum()
        change = new - c
        moved = float((change @ k @ change).clamp(min=0).sqrt())
        c = new
        if moved <= tolerance * max(nu, median(distance)):
            break
    if report is not None:
        report |= {"coefficients": rows.spread(c), "iterations": step}
    return rows.combine(c)
