"""Geometry of classes in an embedding space: statistics, their exact merge, eigen-directions, generated rows.

Pure functions after Dai et al., "Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated
Learning" (GGEUR), CVPR 2025. A covariance S is held as a factor F (r, d) with F'F = S and r at most its rank bound, so
nothing of size (d, d) arises while fewer rows than d exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = ("sqrt", "eigenvalue")
BOOSTS = ("none", "top10", "code")
BOOSTED = torch.linspace(
    5, 1, 10, dtype=torch.float64
)  # factors of eigenvalues in the authors' multi-domain code


@dataclass(frozen=True)
class ClassStatistics:
    """Counts ``n`` (C,) int64, means ``mean`` (C, d) and covariance factors (r_c, d) of C classes, float64.

    The covariance of class c, divisor n, is ``factors[c].T @ factors[c]``. A class without rows has n = 0,
    mean 0 and an empty factor.
    """

    n: Tensor
    mean: Tensor
    factors: tuple[Tensor, ...]

    @property
    def mu(self) -> Tensor:
        """The means (C, d), under the paper's symbol."""
        return self.mean

    @property
    def S(self) -> Tensor:  # noqa: N802 - the paper's symbol
        """All covariances (C, d, d); dense, for small d and for looking at."""
        return torch.stack([f.T @ f for f in self.factors])

    def covariance(self, label: int) -> Tensor:
        """Covariance (d, d) of one class."""
        return self.factors[label].T @ self.factors[label]

    def __len__(self) -> int:
        return len(self.factors)


@dataclass(frozen=True)
class Geometry:
    """Per class a matrix A (p_c, d): ``z @ A`` with z ~ N(0, I) has the class's shape, A'A = S where scale is sqrt.

    ``n`` (C,) are the class counts; ``jitter`` is a variance added in every direction of the space.
    """

    n: Tensor
    factors: tuple[Tensor, ...]
    jitter: float = 0.0

    @property
    def lam(self) -> tuple[Tensor, ...]:
        """Squared lengths of the rows of A, descending; eigenvalues of S unless scaled or boosted otherwise."""
        return tuple((a * a).sum(1) for a in self.factors)

    @property
    def ranks(self) -> list[int]:
        """Directions p kept per class."""
        return [len(a) for a in self.factors]

    def covariance(self, label: int) -> Tensor:
        """Covariance (d, d) of the rows generated around one point."""
        a = self.factors[label]
        return a.T @ a + self.jitter * torch.eye(a.shape[1], dtype=a.dtype)

    def to(self, dtype: torch.dtype) -> Geometry:
        """The same in another precision."""
        return Geometry(self.n, tuple(a.to(dtype) for a in self.factors), self.jitter)

    def __getitem__(self, label: int) -> Tensor:
        return self.factors[label]

    def __len__(self) -> int:
        return len(self.factors)


def class_statistics(x: Tensor, y: Tensor, num_classes: int) -> ClassStatistics:
    """Counts, means and covariances (divisor n) of the rows ``x`` (n, d) by class ``y`` (n,), in float64.

    Raises:
        ValueError: for wrong shapes, a label outside 0..num_classes - 1, or a row that is not finite (named).
    """
    x, y = torch.as_tensor(x).detach().cpu().double(), torch.as_tensor(y).cpu()
    if x.dim() != 2 or y.shape != (len(x),):
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; expected (n, d) and (n,)")
    bad = torch.nonzero(~torch.isfinite(x).all(1)).flatten()
    if len(bad):
        raise ValueError(f"row {int(bad[0])} is not finite ({len(bad)} of {len(x)} rows)")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}; expected 0 to {num_classes - 1}")
    means, factors = [], []
    for label in range(num_classes):
        mean, factor = _mean_and_factor(x[y == label])
        means.append(mean)
        factors.append(factor)
    n = torch.bincount(y.long(), minlength=num_classes)
    mean = torch.stack(means) if means else x.new_zeros(0, x.shape[1])
    return ClassStatistics(n, mean, tuple(factors))


def merge_statistics(statistics: Sequence[ClassStatistics], *, coverage: float = 1.0) -> ClassStatistics:
    """Statistics of the pooled rows: equation 4 of the paper, exact, between clients' means included.

    Merging merged statistics gives the same, so late ones can be added at any time. With ``coverage`` < 1 a class
    takes only its largest contributors that together hold this share of its rows (0.8 in the authors' single-domain
    code).

    Raises:
        ValueError: for an empty list, or where numbers of classes or sizes of embeddings differ (by position).
    """
    if not statistics:
        raise ValueError("merge of no statistics; expected at least one")
    first = statistics[0].mean.shape
    for i, part in enumerate(statistics):
        if part.mean.shape != first:
            raise ValueError(
                f"statistics {i} have (classes, d) = {tuple(part.mean.shape)}, statistics 0 have {tuple(first)}"
            )
    merged = [_merge_class(statistics, label, coverage) for label in range(first[0])]
    n = torch.tensor([count for count, _, _ in merged], dtype=torch.int64)
    mean = torch.stack([mean for _, mean, _ in merged]) if merged else statistics[0].mean
    return ClassStatistics(n, mean, tuple(factor for _, _, factor in merged))


def class_geometry(
    statistics: ClassStatistics,
    *,
    energy: float = 1.0,
    scale: str = "sqrt",
    boost: str = "none",
    jitter: float = 0.0,
) -> Geometry:
    """Eigen-directions of every class, each scaled by its standard deviation: ``A = diag(sqrt(lam)) Xi'`` (p, d).

    Args:
        statistics: of all clients.
        energy: the fewest directions that hold this share of the trace are kept; 1 keeps the whole rank.
        scale: ``sqrt`` reproduces S; ``eigenvalue`` steps lam along xi, as equation 5 is printed.
        boost: ``top10`` multiplies the ten largest eigenvalues by 5 to 1; ``code`` the ten smallest of all d, which
            is what the authors' multi-domain scripts do; ``none``.
        jitter: variance added in every direction (1e-6 in the authors' code).
    """
    if not 0 < energy <= 1 or scale not in SCALES or boost not in BOOSTS or jitter < 0:
        raise ValueError(
            f"energy={energy} scale={scale} boost={boost} jitter={jitter}: give 0 < energy <= 1, scale of {SCALES}, "
            f"boost of {BOOSTS}, jitter >= 0"
        )
    factors = []
    for factor in statistics.factors:
        lam, a = _directions(factor)
        if len(lam):
            share = torch.cumsum(lam, 0) / lam.sum()
            p = len(lam) if energy == 1 else int(torch.searchsorted(share, energy * (1 - 1e-12))) + 1
            lam, a = lam[:p], a[:p]
            if scale == "eigenvalue":
                a = a * lam.sqrt()[:, None]
            a = a * _boost(len(lam), factor.shape[1], boost).sqrt()[:, None]
        factors.append(a)
    return Geometry(statistics.n, tuple(factors), jitter)


def similarity(one: Tensor, other: Tensor, directions: int = 5) -> float:
    """Equation 3: ``sum |<xi_a, xi_b>|`` over the leading directions of two shapes (p, d), rows scaled or not."""
    k = min(directions, len(one), len(other))
    a, b = (torch.nn.functional.normalize(m[:k], dim=1) for m in (one, other))
    return float((a * b).sum(1).abs().sum())


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and factor (min(n - 1, d), d) of rows (n, d). Equal rows give exactly zero."""
    n, d = x.shape
    if n == 0:
        return x.new_zeros(d), x.new_zeros(0, d)
    shifted = x - x[0]
    middle = shifted.mean(0)
    return x[0] + middle, _triangle(_contrasts(shifted - middle) / math.sqrt(n))


def _contrasts(centred: Tensor) -> Tensor:
    """Where n <= d: n - 1 orthonormal contrasts (Helmert's) of n centred rows, the same scatter in a row less."""
    n, d = centred.shape
    if n > d:
        return centred
    k = torch.arange(1, n, dtype=centred.dtype)[:, None]
    return (torch.cumsum(centred, 0)[:-1] - k * centred[1:]) / torch.sqrt(k * (k + 1))


def _triangle(rows: Tensor) -> Tensor:
    """The triangular factor R (min(r, d), d) with R'R = rows' rows: it says no more than that product."""
    if not len(rows):
        return rows
    r = torch.linalg.qr(rows, mode="r").R
    signed: Tensor = r * torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None]
    return signed


def _merge_class(
    statistics: Sequence[ClassStatistics], label: int, coverage: float
) -> tuple[int, Tensor, Tensor]:
    """Count, mean (d,) and factor (r, d) of one class over all parts."""
    parts = [(int(s.n[label]), s.mean[label], s.factors[label]) for s in statistics]
    parts = [part for part in parts if part[0] > 0]
    if coverage < 1 and parts:
        order = sorted(range(len(parts)), key=lambda i: -parts[i][0])
        held = torch.cumsum(torch.tensor([parts[i][0] for i in order]), 0)
        enough = int(torch.searchsorted(held, coverage * float(held[-1]))) + 1
        parts = [parts[i] for i in sorted(order[:enough])]
    mean = statistics[0].mean
    if not parts:
        return 0, mean.new_zeros(mean.shape[1]), mean.new_zeros(0, mean.shape[1])
    total, start = sum(n for n, _, _ in parts), parts[0][1]
    middle = start + sum((n / total) * (mu - start) for n, mu, _ in parts)
    rows = []
    for n, mu, factor in parts:
        rows.append(math.sqrt(n / total) * factor)
        if len(parts) > 1:
            rows.append(math.sqrt(n / total) * (mu - middle)[None])
    stacked = torch.cat(rows)
    return total, middle, _triangle(stacked) if len(stacked) > stacked.shape[1] else stacked


def _directions(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (p,) of B'B, descending, and ``diag(sqrt(lam)) Xi'`` (p, d), p the numerical rank of B (R, d)."""
    r, d = b.shape
    if r == 0:
        return b.new_zeros(0), b
    if r < d:
        lam, u = torch.linalg.eigh(b @ b.T)
        a = u.T @ b
    else:
        lam, v = torch.linalg.eigh(b.T @ b)
        a = lam.clamp(min=0).sqrt()[:, None] * v.T
    lam, a = lam.flip(0), a.flip(0)
    keep = lam > lam[0].clamp(min=0) * max(r, d) * torch.finfo(b.dtype).eps
    return lam[keep], a[keep]


def _boost(p: int, d: int, kind: str) -> Tensor:
    """Factors (p,) on descending eigenvalues."""
    out = torch.ones(p, dtype=torch.float64)
    if kind == "top10":
        out[:10] = BOOSTED[: min(p, 10)]
    elif kind == "code":
        for j in range(max(0, d - 10), p):
            out[j] = BOOSTED[d - 1 - j]
    return out


def absent_classes(n: Tensor) -> Tensor:
    """From counts (K, C): a client that lacks classes spreads a weight of 1 over them; summed over clients, (C,)."""
    lacking = (n == 0).double()
    return (lacking / lacking.sum(1, keepdim=True).clamp(min=1)).sum(0)
