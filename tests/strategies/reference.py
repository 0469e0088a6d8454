"""FedSpeed, FedDyn and FedAvg in plain float64 numpy, written from their equations, one loop per client.

Problems are gradients, not data: ``gradients[i][j](x)`` is client i's gradient on its j-th mini-batch; a round walks
through all of them ``epochs`` times. Nothing here is shared with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Vector = np.ndarray
Gradient = Callable[[Vector], Vector]


@dataclass
class Trace:
    """What a run went through: ``x`` (T, d), duals ``h`` (T, m, d), ``hbar`` (T, d), local models by round."""

    x: list[Vector] = field(default_factory=list)
    h: list[Vector] = field(default_factory=list)
    hbar: list[Vector] = field(default_factory=list)
    x_local: list[dict[int, Vector]] = field(default_factory=list)


def clipped(v: Vector, bound: float | None) -> Vector:
    """``v min(1, bound / (|v| + 1e-6))``."""
    return v if bound is None else v * min(1.0, bound / (np.linalg.norm(v) + 1e-6))


def fedspeed(
    gradients: Sequence[Sequence[Gradient]],
    x0: Vector,
    cohorts: Sequence[Sequence[int]],
    *,
    epochs: int = 4,
    lr: float = 0.1,
    lr_decay: float = 0.998,
    lamb: float = 0.1,
    rho: float = 0.1,
    alpha: float = 1.0,
    normalize: bool = True,
    weight_decay: float = 1e-3,
    clip_norm: float | None = 10.0,
    clip: str = "direction",
    momentum: float = 0.0,
    beta: float = 0.0,
    dual_mean: str = "all",
    weights: Sequence[float] | None = None,
) -> Trace:
    """Sections 3, 4 and 6 of the specification. ``lamb`` is 1/lambda, ``h_i = -lambda g_hat_i``."""
    m, x = len(gradients), x0.copy()
    h = np.zeros((m, len(x0)))
    last: list[Vector | None] = [None] * m
    trace = Trace()
    for t, cohort in enumerate(cohorts):
        eta, local = lr * lr_decay**t, dict[int, Vector]()
        moved = {}
        for i in cohort:
            known = last[i]
            start = x if known is None or beta == 0 else x + beta * (x - known)
            w, speed = start.copy(), np.zeros_like(x)
            for gradient in list(gradients[i]) * epochs:
                g1 = gradient(w)
                if rho and alpha:
                    radius = rho / (np.linalg.norm(g1) + 1e-7) if normalize else rho
                    g = (1 - alpha) * g1 + alpha * gradient(w + radius * g1)
                else:
                    g = g1
                correction = lamb * (h[i] - start)  # -g_hat - lamb * x_start
                v = _clipped_sum(g, correction, (weight_decay + lamb) * w, clip, clip_norm)
                speed = momentum * speed + v
                w = w - eta * speed
            local[i], moved[i] = w, w - start
        for i in cohort:
            h[i] = h[i] + moved[i]
            last[i] = local[i]
        share = np.array([1.0 if weights is None else weights[i] for i in cohort])
        share = share / share.sum() if len(cohort) else share
        if cohort:
            mean = sum(p * local[i] for p, i in zip(share, cohort, strict=True))
            active = sum(p * h[i] for p, i in zip(share, cohort, strict=True))
            x = mean + (h.mean(0) if dual_mean == "all" else active)
        trace.x.append(x.copy())
        trace.h.append(h.copy())
        trace.hbar.append(h.mean(0))
        trace.x_local.append(local)
    return trace


def _clipped_sum(g: Vector, correction: Vector, decay: Vector, clip: str, limit: float | None) -> Vector:
    """The three parts of FedSpeed's direction, with those clipped that ``clip`` names."""
    if clip == "direction":
        return clipped(g + correction, limit) + decay
    if clip == "loss":
        return clipped(g, limit) + correction + decay
    return clipped(g + correction + decay, limit)


def feddyn(
    gradients: Sequence[Sequence[Gradient]],
    x0: Vector,
    cohorts: Sequence[Sequence[int]],
    *,
    epochs: int = 4,
    lr: float = 0.1,
    lr_decay: float = 0.998,
    a: float = 0.1,
    weight_decay: float = 1e-3,
) -> Trace:
    """Section 10: step with ``g - g_i + a (x - x^t)``; ``g_i -= a (x_K - x^t)``; ``h -= (a/m) sum (x_K - x^t)``;
    ``x^{t+1} = mean(x_K) - h / a``. No clipping."""
    m, x = len(gradients), x0.copy()
    duals, h = np.zeros((m, len(x0))), np.zeros_like(x0)
    trace = Trace()
    for t, cohort in enumerate(cohorts):
        eta, ends = lr * lr_decay**t, []
        for i in cohort:
            w = x.copy()
            for gradient in list(gradients[i]) * epochs:
                w = w - eta * (gradient(w) - duals[i] + a * (w - x) + weight_decay * w)
            ends.append(w)
            duals[i] = duals[i] - a * (w - x)
        h = h - a / m * sum(w - x for w in ends)
        x = np.mean(ends, 0) - h / a
        trace.x.append(x.copy())
    return trace


def fedavg(
    gradients: Sequence[Sequence[Gradient]],
    x0: Vector,
    cohorts: Sequence[Sequence[int]],
    *,
    epochs: int = 4,
    lr: float = 0.1,
    lr_decay: float = 0.998,
    weight_decay: float = 1e-3,
    clip_norm: float | None = 10.0,
    momentum: float = 0.0,
    server_lr: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Trace:
    """Section 10: K SGD steps, ``x += server_lr * mean(x_K - x)``."""
    x, trace = x0.copy(), Trace()
    for t, cohort in enumerate(cohorts):
        eta, total, change = lr * lr_decay**t, 0.0, np.zeros_like(x)
        for i in cohort:
            w, speed = x.copy(), np.zeros_like(x)
            for gradient in list(gradients[i]) * epochs:
                speed = momentum * speed + clipped(gradient(w), clip_norm) + weight_decay * w
                w = w - eta * speed
            weight = 1.0 if weights is None else weights[i]
            total, change = total + weight, change + weight * (w - x)
        x = x + server_lr * change / total
        trace.x.append(x.copy())
    return trace


def affine(a: np.ndarray, b: np.ndarray) -> list[list[Gradient]]:
    """Gradients ``A[i, j] x - b[i, j]`` of m clients with n mini-batches each; A (m, n, d, d), b (m, n, d)."""
    return [
        [lambda x, p=p, q=q: p @ x - q for p, q in zip(ai, bi, strict=True)]
        for ai, bi in zip(a, b, strict=True)
    ]
