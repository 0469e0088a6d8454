"""FedoSSL in NumPy, float64, row by row, from the equations: no code of the package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np

Array = Any  # float64


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def unit(rows: Array) -> Array:
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return rows / np.where(length == 0, 1, length)


def sinkhorn(scores: Array, sharpness: float, iterations: int) -> Array:
    n, k = scores.shape
    p = softmax(sharpness * scores).T
    c = np.full(n, 1 / n)
    for i in range(iterations):
        r = (1 / k) / (p @ c)
        c_new = (1 / n) / (r @ p)
        change = np.abs(c / c_new - 1).sum()
        c = c_new
        if i % 10 == 0 and change < 0.01:
            break
    return n * np.diag(c) @ p.T @ np.diag(r)


def local_centroids(memory: Array, start: Array) -> Array:
    centroids = start.copy()
    for _ in range(5):
        nearest = sinkhorn(memory @ centroids.T, 25, 10).argmax(axis=1)
        for j in range(len(centroids)):
            if (nearest == j).any():
                mean = memory[nearest == j].mean(axis=0)
                centroids[j] = mean / np.sqrt(mean @ mean)
    return centroids


def global_loss(m: Array, z: Array, wanted: Array) -> float:
    p = softmax(unit(z) @ m.T / 0.1)
    cosines = [(a @ b) / np.sqrt((a @ a) * (b @ b)) for a, b in zip(wanted, p, strict=True)]
    return -float(np.mean(cosines))


def slope(f: Any, x: Array, h: float = 1e-6) -> Array:
    """Central differences of ``f`` at ``x``, entry by entry."""
    out = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[at] = h
        out[at] = (f(x + step) - f(x - step)) / (2 * h)
    return out


def global_centroids(z: Array, start: Array, steps: int) -> Array:
    m, velocity = start.copy(), np.zeros_like(start)
    for _ in range(steps):
        wanted = sinkhorn(z @ m.T, 25, 100)
        g = slope(lambda x, s=wanted: global_loss(x, z, s), m) + 1e-4 * m
        velocity = 0.9 * velocity + g
        m = unit(m - 0.01 * velocity)
    return m


def aligned(m: Array, means: Array, classes: Sequence[int]) -> Array:
    """Every choice of rows tried."""
    cosines = unit(means) @ unit(m).T
    best = max(
        permutations(range(len(m)), len(classes)),
        key=lambda rows: sum(cosines[c, r] for c, r in zip(classes, rows, strict=True)),
    )
    rest = [r for r in range(len(m)) if r not in best]
    out = []
    for place in range(len(m)):
        out.append(m[best[list(classes).index(place)]] if place in classes else m[rest.pop(0)])
    return np.array(out)


def rho(counts: Array, tau: float, form: str) -> Array:
    share = counts / counts.max()
    return {"printed": tau ** (1 - share), "inverse": tau**share, "flat": np.ones(len(counts))}[form]


def q(z: Array, m: Array) -> Array:
    return softmax(unit(z) @ m.T / 0.1)


def h(a: Array, b: Array) -> float:
    return float(np.mean([-(x * np.log(y)).sum() for x, y in zip(a, b, strict=True)]))


def objective(
    views: Sequence[Array],
    y: Array,
    counts: Array,
    u: float,
    m: Array | None,
    *,
    q_fixed: Array | None = None,
    **options: Any,
) -> float:
    """L of a batch; ``q_fixed``: assignments of the first view that have no gradient."""
    o = {
        "alpha": 1.0,
        "beta": 1.0,
        "gamma": 1.0,
        "tau": 0.2,
        "form": "printed",
        "margin": True,
        "entropy": True,
        "hard": False,
        "ce_weight": 1.0,
        "cluster_weight": 1.0,
        **options,
    }
    z, logits, z2, logits2 = views
    p, p2 = softmax(logits), softmax(logits2)
    cosines = unit(z) @ unit(z).T
    np.fill_diagonal(cosines, -np.inf)
    partner = options.get("partners", cosines.argmax(axis=1))
    loss = -o["alpha"] * np.mean([np.log(p[i] @ p2[j]) for i, j in enumerate(partner)])
    has = [i for i in range(len(y)) if y[i] >= 0]
    lacks = [i for i in range(len(y)) if y[i] < 0]
    if has:
        shifted = logits.copy()
        if o["margin"]:
            shifted[has, y[has]] += 10 * min(u, 0.5)
        loss -= np.mean(np.log(softmax(shifted)[has, y[has]]))
    if lacks:
        weights = rho(counts, o["tau"], o["form"])
        loss += o["beta"] * np.mean([weights[p[i].argmax()] * (1 - p[i].max()) for i in lacks])
    if o["entropy"]:
        mean = p.mean(axis=0)
        loss += (mean * np.log(mean)).sum()
    if m is None:
        return float(loss)
    found = q(z, m) if q_fixed is None else q_fixed
    if lacks and not o["hard"]:
        loss += o["gamma"] * o["ce_weight"] * h(found[lacks], p[lacks])
    sure = [i for i in lacks if found[i].max() > 0.95]
    if sure and o["hard"]:
        ce = np.mean([-np.log(p[i, found[i].argmax()]) for i in sure])
        loss += o["gamma"] * o["ce_weight"] * ce
    loss += o["gamma"] * o["cluster_weight"] * h(q(z, m), q(z2, m)[partner])
    return float(loss)
