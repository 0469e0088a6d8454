"""The flag aggregator. Almasi, Mishra, Vamanan, Ravi: Flag Aggregator: Scalable Distributed Training under Failures and
Augmented Losses using Convex Optimization, ICLR 2024 (arXiv 2302.05865), Algorithm 1.

Everything lives in the span of the n updates, so a basis Y of the subspace is never formed: with unit columns ``X`` and
``K = X'X = C C'`` (C = V L^(1/2) from K's eigenvectors), ``X = Q C'`` for some orthonormal Q and ``Y = Q Z``. An
iteration needs only ``T = Y'X = Z'C'`` (m, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.aggregators.before import Before, prepared
from strategies.aggregators.gram import finite_gram, median, squared_distances
from strategies.aggregators.rows import Report, Rows, RuleError, choice, whole

EPS = 1e-7  # added to residuals in the weights, as in the public code
TINY = 1e-12  # norms below count as this
RANK = 1e-13  # eigenvalues of K below this share of the largest are rounding


def flag(
    updates: Any,
    weights: Any = None,
    *,
    m: int | None = None,
    iterations: int = 5,
    tolerance: float = 1e-10,
    lam: float = 0.0,
    scale: str = "median_norm",
    pairs: str = "code",
    start: Any = None,
    before: Before = (),
    report: Report | None = None,
) -> Any:
    """Average of the updates' projections on the subspace that explains them best, ``sum_i a_i u_i`` (d,).

    The subspace Y minimises ``sum_i sqrt(1 - v_i)``, ``v_i = |Y'x_i|^2`` the explained variance of the unit update
    ``x_i``, plus ``lam`` times a like sum over pairs (eq. 5), by iteratively reweighted least squares.

    Args:
        updates: (n, d).
        weights: not used: the rule looks at directions, and a hostile client would choose its weight.
        m: dimensions of the subspace; ``ceil((n + 1) / 2)`` by default, n without non-finite rows.
        iterations: at most so many steps; the first one starts from the flag mean (all residuals 1).
        tolerance: stop once the objective (without its pair part) drops by no more.
        lam: weight of the pair terms.
        scale: what is averaged. ``median_norm``: unit updates, times the median norm (not published; keeps the size of
            an update). ``unit``: ``(1/m) Y Y' sum x_i``, the public code; its size does not depend on the updates'.
            ``raw``: ``(1/n) Y Y' sum u_i``, the paper's Algorithm 1, which a single long update takes over.
        pairs: ``code``: columns ``x_i - x_j`` with factor ``lam / (n (n - 1))``; ``paper``: ``(u_i - u_j) / |u_i -
            u_j|`` with ``sqrt(lam / (n - 1))``, which outweighs the updates themselves when lam is near n.
        start: orthonormal (d, k) to start from instead of the flag mean.
        before: see ``aggregator.before``.
        report: receives ``coefficients`` a_i, ``explained`` v_i, ``objective`` (one value per accepted step),
            ``dropped``.
    """
    choice("flag", "scale", scale, ("median_norm", "unit", "raw"))
    choice("flag", "pairs", pairs, ("code", "paper"))
    iterations = whole("flag", "iterations", iterations, 1, "the reweighted steps at most")
    if m is not None:
        m = whole("flag", "m", m, 1, "the subspace's dimensions")
    if not tolerance >= 0 or not 0 <= lam < float("inf"):
        raise RuleError(
            f"flag: tolerance={tolerance} and lam={lam} must not be negative, and lam must be finite"
        )
    k, rows = finite_gram("flag", prepared("flag", updates, weights, before, report=report), report)
    n = len(rows)
    norms = k.diagonal().sqrt()
    if n == 0 or not float(norms.max()) > 0:
        _tell(report, rows, torch.zeros(n), torch.zeros(n), [0.0])
        return rows.zeros()
    m = (n + 2) // 2 if m is None else m
    problem = _Problem.of(k, norms, m, float(lam), pairs)
    y = None if start is None else _start(start, rows)
    t = torch.zeros(m, n, dtype=torch.float64) if y is None else _project(y, rows) / norms.clamp(min=TINY)
    z: Tensor | None = None
    objective = [_objective(t)]
    for _ in range(iterations):
        new_z, new_t = problem.step(t)
        value = _objective(new_t)
        if value >= objective[-1]:
            break
        z, t = new_z, new_t
        objective.append(value)
        if objective[-2] - value <= tolerance or value <= 1e-10:
            break
    q = t @ (norms if scale == "raw" else torch.ones_like(norms))
    size = {"raw": 1 / n, "unit": 1 / m, "median_norm": median(norms) / n}[scale]
    if z is None and y is not None:  # no step improved on the start, which need not lie in the updates' span
        _tell(report, rows, torch.zeros(n), (t**2).sum(0), objective)
        return rows.fill(size * (y[a:b] @ q.to(y.device)) for a, b in rows.spans())
    a = torch.zeros_like(norms) if z is None else size * (problem.back @ (z @ q)) / norms.clamp(min=TINY)
    _tell(report, rows, a, (t**2).sum(0), objective)
    return rows.combine(a)


@dataclass(frozen=True)
class _Problem:
    """One aggregation in coordinates of the updates' span (r dimensions)."""

    c: Tensor  # (n, r): X = Q c'
    back: Tensor  # (n, r): Q = X back
    norms: Tensor
    squared: Tensor  # (n, n) squared distances of the updates, raw
    m: int
    lam: float
    pairs: str

    @staticmethod
    def of(k: Tensor, norms: Tensor, m: int, lam: float, pairs: str) -> _Problem:
        safe = norms.clamp(min=TINY)
        values, vectors = torch.linalg.eigh(k / (safe[:, None] * safe[None, :]))
        full = values > RANK * values[-1]
        root, v = values[full].sqrt(), vectors[:, full]
        distance = squared_distances(k) if lam and pairs == "paper" else k
        return _Problem(v * root, v / root, norms, distance, m, lam, pairs)

    def step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """From T (., n) of the current basis: the next one as Z (r, m), and its T (m, n).

        Columns are scaled by ``(|1 - v| + eps)^(-1/4)``; Z are the leading eigenvectors of the scaled columns' scatter.
        """
        scatter = torch.diag(_weight((t**2).sum(0)))
        if self.lam:
            scatter = scatter + self._pair_part(t)
        values, vectors = torch.linalg.eigh(self.c.T @ scatter @ self.c)
        top = torch.arange(len(values) - 1, max(-1, len(values) - 1 - self.m), -1)
        z = vectors[:, top[values[top] > 1e-20 * values[-1]]]
        return z, z.T @ self.c.T

    def _pair_part(self, t: Tensor) -> Tensor:
        """Scatter of the pair columns in terms of X: a graph Laplacian."""
        n = t.shape[1]
        if n < 2:
            return torch.zeros(n, n, dtype=torch.float64)
        if self.pairs == "code":
            factor = self.lam / (n * (n - 1))
            return _laplacian(2 * factor**2 * _weight(squared_distances(t.T @ t)))
        scaled = t * self.norms
        size = self.norms**2
        apart = self.squared > 1e-14 * (size[:, None] + size[None, :])  # equal updates make no pair
        d2 = torch.where(apart, self.squared, 1.0)
        w = _weight(squared_distances(scaled.T @ scaled) / d2) / d2
        inner = _laplacian(torch.where(apart, 2 * self.lam / (n - 1) * w, 0.0))
        safe = self.norms.clamp(min=TINY)
        return safe[:, None] * inner * safe[None, :]


def _weight(v: Tensor) -> Tensor:
    """Squared column factors ``(|1 - v| + eps)^(-1/2)``."""
    return ((1 - v).abs() + EPS) ** -0.5


def _laplacian(w: Tensor) -> Tensor:
    w = w - torch.diag(w.diagonal())
    return torch.diag(w.sum(1)) - w


def _objective(t: Tensor) -> float:
    """``sum_i sqrt(1 - v_i)``, residuals below zero by rounding count as zero."""
    return float((1 - (t**2).sum(0)).clamp(min=0).sqrt().sum())


def _start(start: Any, rows: Rows) -> Tensor:
    y = torch.as_tensor(start).to(rows.device, torch.float64)
    if y.dim() != 2 or y.shape[0] != rows.dim:
        raise RuleError(
            f"flag: start has shape {tuple(y.shape)}, expected ({rows.dim}, m) orthonormal columns"
        )
    return y


def _project(y: Tensor, rows: Rows) -> Tensor:
    """``Y'u_i`` (k, n), one pass."""
    out = torch.zeros(y.shape[1], len(rows), dtype=torch.float64, device=rows.device)
    for a, b in rows.spans():
        out += y[a:b].T @ rows.read(a, b).T
    return out.cpu()


def _tell(report: Report | None, rows: Rows, a: Tensor, explained: Tensor, objective: list[float]) -> None:
    if report is not None:
        report |= {
            "coefficients": rows.shares(a),
            "explained": rows.spread(explained),
            "objective": objective,
            "iterations": len(objective) - 1,
        }
