"""Rules that look at one coordinate at a time. All treat updates alike: a hostile client would choose its weight.

Xie, Koyejo, Gupta: Generalized Byzantine-tolerant SGD, 2018 (MeaMed); Phocas, 2018. Yin, Chen, Ramchandran, Bartlett:
Byzantine-Robust Distributed Learning, ICML 2018 (median, trimmed mean).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.rows import Report, Rows, choice, tolerated


def coordinate_median(
    updates: Any,
    weights: Any = None,
    *,
    even: str = "average",
    before: Before = (),
    report: Report | None = None,
) -> Any:
    """Median of each coordinate of ``updates`` (n, d); ``weights`` are not used.

    ``even``: of the two middle values of an even n take the ``average``, or the ``lower`` one as ``torch.median`` and
    the flag aggregator's public code do.
    """
    choice("coordinate_median", "even", even, ("average", "lower"))
    rows = _finite("coordinate_median", updates, weights, before, None, 0, report)
    if even == "lower":
        return _each(rows, lower_middle)
    return _each(rows, middle)


def trimmed_mean(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Mean of each coordinate without its f lowest and f highest values; n > 2f. ``weights`` are not used."""
    rows = _finite("trimmed_mean", updates, weights, before, f, removed, report)
    f = tolerated("trimmed_mean", rows, f, removed) if len(rows) else 0
    return _each(rows, lambda x: x[f : len(x) - f].mean(0))


def meamed(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Mean of the n - f values of each coordinate that are closest to its median; n > 2f. ``weights`` are not used."""
    rows = _finite("meamed", updates, weights, before, f, removed, report)
    f = tolerated("meamed", rows, f, removed) if len(rows) else 0
    return _each(rows, lambda x: closest_mean(x, middle(x), len(x) - f))


def phocas(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """Mean of the n - f values of each coordinate closest to its trimmed mean; n > 2f. ``weights`` are not used."""
    rows = _finite("phocas", updates, weights, before, f, removed, report)
    f = tolerated("phocas", rows, f, removed) if len(rows) else 0
    return _each(rows, lambda x: closest_mean(x, x[f : len(x) - f].mean(0), len(x) - f))


def middle(x: Tensor) -> Tensor:
    """Median (c,) of sorted columns ``x`` (n, c); the mean of the middle two if n is even."""
    n = len(x)
    return x[n // 2] if n % 2 else (x[n // 2 - 1] + x[n // 2]) / 2


def lower_middle(x: Tensor) -> Tensor:
    """Median (c,) of sorted columns ``x`` (n, c); the lower of the middle two if n is even."""
    return x[(len(x) - 1) // 2]


def closest_mean(x: Tensor, centre: Tensor, count: int) -> Tensor:
    """Mean (c,) of the ``count`` values of each sorted column of ``x`` (n, c) closest to ``centre`` (c,).

    They are neighbours in the sorted column; of two equally far ones the lower is taken.
    """
    n = len(x)
    low = torch.zeros_like(centre, dtype=torch.long)  # values given up at the lower end
    high = torch.full_like(low, n - 1)
    for _ in range(n - count):
        below, above = x.gather(0, low[None])[0], x.gather(0, high[None])[0]
        drop_low = (centre - below) > (above - centre)
        low += drop_low.long()
        high -= (~drop_low).long()
    place = torch.arange(n, device=x.device)[:, None]
    inside = (place >= low) & (place <= high)
    return torch.where(inside, x, 0.0).sum(0) / count


def sorted_columns(rows: Rows, rule: Callable[[Tensor], Tensor]) -> Any:
    """``rule`` on sorted columns (n, c), piece by piece; the result (d,)."""
    return rows.fill(rule(ascending(rows.read(a, b))) for a, b in rows.spans())


def ascending(x: Tensor) -> Tensor:
    """Columns of ``x`` (n, c) in ascending order; on a CPU by numpy, which sorts short columns ten times as fast."""
    if x.device.type != "cpu":
        return x.sort(dim=0).values
    return torch.from_numpy(np.sort(x.numpy(), axis=0))


def _finite(
    rule: str, updates: Any, weights: Any, before: Before, f: Any, removed: int, report: Report | None
) -> Rows:
    rows = prepared(rule, updates, weights, before, f, removed, report)
    return rows.without(rule, rows.finite(), report)


def _each(rows: Rows, rule: Callable[[Tensor], Tensor]) -> Any:
    return sorted_columns(rows, rule) if len(rows) else rows.zeros()
