"""Covariance-bound agnostic filter. Allouah, Guerraoui, Stephan: Towards Trustworthy Federated Learning with Untrusted
Participants, ICML 2025.

Means and covariances of the updates lie in their span, so every step works on the n x n inner products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.gram import near_gram
from strategies.aggregators.rows import Report, tolerated

SLOW = 1e-4  # share of n by which the weights must fall in a step to go on as published


def caf(
    updates: Any,
    weights: Any = None,
    *,
    f: int,
    before: Before = (),
    removed: int = 0,
    report: Report | None = None,
) -> Any:
    """The weighted mean (d,) of the rows of ``updates`` (n, d), of all those on the way, whose covariance has the least
    top eigenvalue; n > 2f. ``weights`` are not used; f = 0 is the mean.

    All weights start at 1. While their sum is above n - 2f, with the mean mu and the top eigenvector v of the weighted
    covariance: ``tau_i = <u_i - mu, v>^2``, ``c_i <- c_i (1 - tau_i / max_j tau_j)``. The maximum is over all rows, as
    ByzFL publishes it; a row of no weight left can then hold all others' weights up for ever, so once their sum falls
    by less than ``SLOW`` n in a step it is taken over rows that have some.
    """
    k, rows = near_gram("caf", prepared("caf", updates, weights, before, f, removed, report), report)
    if not len(rows):
        return rows.zeros()
    f = tolerated("caf", rows, f, removed)
    c, steps = _filtered(k, f)
    if report is not None:
        report |= {"coefficients": rows.shares(c), "iterations": steps}
    return rows.combine(c)


def _filtered(k: Tensor, f: int) -> tuple[Tensor, int]:
    """Coefficients (n,) of the mean that is returned, and the steps it took, by inner products ``k`` (n, n)."""
    n = len(k)
    c = torch.ones(n, dtype=torch.float64)
    best, least, step, slow = c / n, float("inf"), 0, False
    while (left := float(c.sum())) > n - 2 * f:
        share = c / c.sum()
        middle = k @ share
        about = k - middle[:, None] - middle[None, :] + share @ middle  # <u_i - mu, u_j - mu>
        root = share.sqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * about * root[None, :])
        top = float(values[-1])
        if top < least:
            best, least = share, top
        if not top > 1e-13 * float(share @ k.diagonal()):
            break  # all that have weight are equal
        far = (about @ (root * vectors[:, -1])).abs()  # root of tau, up to the eigenvalue, which cancels
        most = far[c > 0].max() if slow else far.max()
        c = (c * (1 - (far / most).square())).clamp(min=0)
        slow = slow or left - float(c.sum()) < SLOW * n
        step += 1
    return best, step
