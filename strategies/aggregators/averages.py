"""Means: plain, clipped to a length or around a centre, and the geometric median."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.gram import finite_gram, gram, median, near_gram, norms
from strategies.aggregators.rows import Report, RuleError, choice, whole


def mean(updates: Any, weights: Any = None, *, before: Before = (), report: Report | None = None) -> Any:
    """Weighted mean of the rows of ``updates`` (n, d); equal weights by default. McMahan et al. 2017, Alg. 1."""
    rows = prepared("mean", updates, weights, before, report=report)
    out = rows.combine(rows.weights / rows.weights.sum())
    if _finite(torch.as_tensor(out)):
        rows.without("mean", range(len(rows)), report)
        return out
    rows = rows.without("mean", rows.finite(), report)
    total = float(rows.weights.sum())
    return rows.combine(rows.weights / total) if total > 0 else rows.zeros()


def _finite(out: Tensor) -> bool:
    """Whether all numbers of ``out`` (d,) are; those of a finite sum are, others are looked at one by one."""
    return bool(torch.isfinite(out.sum())) or bool(torch.isfinite(out).all())


def norm_clip(updates: Any, weights: Any = None, *, before: Before = (), report: Report | None = None) -> Any:
    """Weighted mean of ``u_i min(1, c / |u_i|)`` (d,), where c is the median of the norms."""
    rows = prepared("norm_clip", updates, weights, before, report=report)
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
    start: str = "mean",
    before: Before = (),
    report: Report | None = None,
) -> Any:
    """The point (d,) with the least weighted sum of distances to the rows of ``updates`` (n, d).

    Smoothed Weiszfeld steps ``z <- sum_i b_i u_i / sum_i b_i``, ``b_i = w_i / max(nu, |z - u_i|)``, from the mean
    (Pillutla, Kakade, Harchaoui: Robust Aggregation for Federated Learning, 2022, Alg. 2; they take 3 to 5 steps,
    here as many as it takes until z moves by less than ``tolerance`` times the median distance). A step works on
    coefficients of the rows and costs n^2. ByzFL's defaults are ``start=zero``, 3 ``iterations``, ``nu=0.1`` and
    ``tolerance=0``.
    """
    choice("geometric_median", "start", start, ("mean", "zero"))
    if iterations < 1 or not nu > 0 or tolerance < 0:
        raise RuleError(
            f"geometric_median: expected iterations >= 1, tolerance >= 0, nu > 0; got {iterations}, {tolerance}, {nu}"
        )
    rows = prepared("geometric_median", updates, weights, before, report=report)
    inner = near_gram if start == "mean" else finite_gram  # differences of rows do not tell how far zero is
    k, rows = inner("geometric_median", rows, report)
    if not len(rows) or not float(rows.weights.sum()) > 0:
        return rows.zeros()
    w, size = rows.weights / rows.weights.sum(), k.diagonal()
    c, step = w if start == "mean" else torch.zeros_like(w), 0
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
        report |= {"coefficients": rows.shares(c), "iterations": step}
    return rows.combine(c)


def centered_clipping(
    updates: Any,
    weights: Any = None,
    *,
    tau: float = 100.0,
    L: int = 1,
    centre: Any = None,
    before: Before = (),
    report: Report | None = None,
) -> Any:
    """``v_l = v_(l-1) + mean_i((u_i - v_(l-1)) min(1, tau / |u_i - v_(l-1)|))`` (d,) after ``L`` steps.

    Karimireddy, He, Jaggi: Learning from History for Byzantine Robust Optimization, ICML 2021, eq. 4. ``weights`` are
    not used.

    Args:
        updates: (n, d).
        weights: see above.
        tau: the longest difference that counts in full.
        L: steps.
        centre: v_0 (d,), zero by default: the result of the round before, which a run hands over.
        before: see ``aggregator.before``.
        report: receives ``coefficients`` of the updates, ``clipped`` (in the last step), ``dropped``.
    """
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not tau > 0:
        raise RuleError(f"centered_clipping: tau={tau!r} must be a positive number")
    L = whole("centered_clipping", "L", L, 1, "the steps")
    rows = prepared("centered_clipping", updates, weights, before, report=report)
    around = None if centre is None else torch.as_tensor(centre).to(rows.device, torch.float64)
    if around is not None and around.shape != (rows.dim,):
        raise RuleError(
            f"centered_clipping: centre has shape {tuple(around.shape)}, expected ({rows.dim},), one row's"
        )
    k = gram(rows, around) if L > 1 else norms(rows, around).square()  # of u_i - v_0, in which all is written
    size = k.diagonal() if L > 1 else k
    good = torch.nonzero(torch.isfinite(size)).flatten().tolist()
    rows, n = rows.without("centered_clipping", good, report), len(good)
    k, size = k[good][:, good] if L > 1 else k[good], size[good]
    c, factor = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    for step in range(L if n else 0):  # v = v_0 + sum_i c_i (u_i - v_0)
        inner = k @ c if step else torch.zeros(n, dtype=torch.float64)
        distance = (size - 2 * inner + c @ inner).clamp(min=0).sqrt()
        factor = torch.where(distance > tau, tau / distance, 1.0)
        c = c * (1 - factor.mean()) + factor / n
    if report is not None:
        report |= {"coefficients": rows.shares(c), "clipped": int((factor < 1).sum())}
    if around is None or not n:
        return rows.combine(c)
    own, c = 1 - float(c.sum()), c.to(rows.device)
    return rows.fill(own * around[a:b] + c @ rows.read(a, b) for a, b in rows.spans())
