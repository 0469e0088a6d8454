"""Fixed classifiers: the simplex equiangular tight frame (ETF) and its sparse form, FedLoGe's SSE-C (ICLR 2024, eq. 4).

Rows are classes here. Everything is computed in float64 by one thread and depends on the arguments alone, so that
server and clients can rebuild the same classifier from its seed.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ArgumentError
from fedsim.rng import numpy_rng
from fedsim.task.threads import one_thread

REDRAWS = 200  # masks drawn before the last one is repaired
CLIP = 1e-5  # distance that cosines keep from -1 and 1 in the loss
DEFAULT_STEPS = {"projection": 200, "adam": 10_000}
BETA1, BETA2, EPSILON, LR = 0.9, 0.999, 1e-8, 1e-4  # Adam, as in the authors' code


def simplex_etf(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """``sqrt(C/(C-1)) (I - 11'/C) P'`` (C, d) float64: unit rows, all cosines ``-1/(C-1)``.

    P is the Q factor of a uniform (d, C) draw keyed by ``seed``. Needs ``dim >= num_classes >= 2``.
    """
    if num_classes < 2:
        raise ArgumentError(f"num_classes={num_classes}: an equiangular frame needs at least 2 classes")
    if dim < num_classes:
        raise ArgumentError(
            f"dim={dim}: {num_classes} classes need at least {num_classes} features; give a wider body"
        )
    draw = torch.from_numpy(numpy_rng(seed, "etf/frame").random((dim, num_classes)))
    with one_thread():
        p: Tensor = torch.linalg.qr(draw)[0]
        return _centring(num_classes) @ p.T


def sparse_etf(
    num_classes: int,
    dim: int,
    *,
    sparsity: float = 0.6,
    norm: float = 0.1,
    solver: str = "projection",
    seed: int = 0,
    mask: Any = None,
    start: Any = None,
    steps: int | None = None,
) -> Tensor:
    """FedLoGe's sparse ETF classifier S (C, d), float64: a random support, rows of norm ``norm``, equal angles.

    On the support it minimises ``sum_i (|s_i| - norm)^2 - mean_i arccos(max_j cos(s_i, s_j))``, whose optimum has all
    cosines at ``-1/(C-1)``.

    Args:
        num_classes: C, at least 2.
        dim: feature size d, at least C.
        sparsity: share of zeros in [0, 1); ``int(sparsity d C)`` entries are zero. 0 is the dense frame.
        norm: length of the rows, the specification's gamma.
        solver: ``projection`` alternates between the nearest ETF and the support; ``adam`` is the authors' masked Adam
            with learning rate 1e-4, which ends near the same point much later.
        seed: of the frame and the support.
        mask: support of one's own, (C, d) or its transpose (d, C), nonzero where entries are kept. It is taken as it
            is; by default one is drawn in which every row has two entries and every two rows overlap.
        start: where the solver starts, (C, d) or (d, C), masked first; by default the dense frame of ``seed``.
        steps: iterations; by default 200 (``projection``) or 10 000 (``adam``).

    Raises:
        ArgumentError: if d < C, an option is out of range, or the support leaves a class without entries.
    """
    if not 0 <= sparsity < 1:
        raise ArgumentError(f"sparsity={sparsity}: give a share of zeros in [0, 1)")
    if not 0 < norm < math.inf:
        raise ArgumentError(f"norm={norm}: the rows' length must be positive")
    if solver not in DEFAULT_STEPS:
        raise ArgumentError(f"solver={solver!r}: choose one of {', '.join(DEFAULT_STEPS)}")
    steps = DEFAULT_STEPS[solver] if steps is None else steps
    if steps < 0:
        raise ArgumentError(f"steps={steps}: must not be negative")
    w = simplex_etf(num_classes, dim, seed) if start is None else _rows(start, "start", num_classes, dim)
    if mask is None:
        kept = _draw_mask(num_classes, dim, sparsity, seed)
    else:
        kept = _rows(mask, "mask", num_classes, dim) != 0
        _check_mask(kept)
    w = w * kept
    if not w.any(dim=1).all():
        raise ArgumentError("start: a class has no entry on its support; every row must be nonzero there")
    with one_thread():
        return _adam(w, kept, norm, steps) if solver == "adam" else _project(w, kept, norm, steps)


def etf_loss(weight: Any, norm: float) -> float:
    """The objective of ``sparse_etf`` at ``weight`` (C, d)."""
    lengths, nearest, _ = _nearest(torch.as_tensor(weight, dtype=torch.float64))
    angles = torch.arccos(nearest.clamp(-1 + CLIP, 1 - CLIP))
    return float(((lengths - norm) ** 2).sum() - angles.mean())


def _centring(classes: int) -> Tensor:
    return math.sqrt(classes / (classes - 1)) * (torch.eye(classes, dtype=torch.float64) - 1 / classes)


def _project(w: Tensor, kept: Tensor, norm: float, steps: int) -> Tensor:
    """Nearest ETF, then the support, ``steps`` times; the polar factor comes from the small Gram matrix."""
    t = _centring(len(w))
    for _ in range(steps):
        a = t @ (w / w.norm(dim=1, keepdim=True))
        values, vectors = torch.linalg.eigh(a @ a.T)
        empty = values <= values[-1] * 1e-12  # the mean direction, at least
        roots = values.masked_fill(empty, 1.0).rsqrt().masked_fill(empty, 0.0)
        w = (t @ (vectors * roots @ vectors.T) @ a) * kept
    lengths: Tensor = w.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise ArgumentError(
            "mask: the projection emptied a class; give a mask with more overlap or solver=adam"
        )
    return w * (norm / lengths)


def _adam(w: Tensor, kept: Tensor, norm: float, steps: int) -> Tensor:
    """Adam on the masked gradient of ``etf_loss``."""
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        g = _gradient(w, norm) * kept
        first += (1 - BETA1) * (g - first)
        second += (1 - BETA2) * (g * g - second)
        root = second.sqrt() / math.sqrt(1 - BETA2**t) + EPSILON
        w = w - LR / (1 - BETA1**t) * first / root
    return w


def _nearest(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths (C,), each row's largest cosine with another (C,), and the first row that has it (C,)."""
    lengths = w.norm(dim=1)
    unit = w / lengths[:, None]
    nearest, other = (unit @ unit.T).fill_diagonal_(-math.inf).max(dim=1)
    return lengths, nearest, other


def _gradient(w: Tensor, norm: float) -> Tensor:
    """Of ``etf_loss`` at ``w`` (C, d): each row is pushed from the first of its nearest rows, and that one from it."""
    lengths, nearest, other = _nearest(w)
    unit = w / lengths[:, None]
    inside = nearest.abs() < 1 - CLIP
    slope = inside / (1 - nearest.masked_fill(~inside, 0.0) ** 2).sqrt() / len(w)
    pairs = torch.zeros(len(w), len(w), dtype=w.dtype)
    pairs[torch.arange(len(w)), other] = slope
    pairs = pairs + pairs.T
    ends = (pairs * (unit @ unit.T)).sum(dim=1, keepdim=True)
    return (pairs @ unit - ends * unit) / lengths[:, None] + 2 * (lengths - norm)[:, None] * unit


def _rows(value: Any, name: str, classes: int, dim: int) -> Tensor:
    """A (C, d) float64 tensor; its transpose is accepted too."""
    array = torch.as_tensor(value).to(torch.float64)
    if array.shape == (dim, classes) and dim != classes:
        array = array.T
    if array.shape != (classes, dim):
        raise ArgumentError(
            f"{name} has shape {tuple(array.shape)}, expected {(classes, dim)} or its transpose"
        )
    if not array.isfinite().all():
        raise ArgumentError(f"{name} holds values that are not finite")
    return array


def _draw_mask(classes: int, dim: int, sparsity: float, seed: int) -> Tensor:
    """A support (C, d) with ``int(sparsity d C)`` zeros: redrawn, then repaired, until all rows meet."""
    zeros = int(sparsity * dim * classes)
    if zeros and dim * (1 - sparsity) ** 2 < 10:
        warnings.warn(
            f"sparsity={sparsity} leaves two classes {dim * (1 - sparsity) ** 2:.1f} of {dim} features in common; "
            "below 10 the angles suffer: give a smaller sparsity or a wider body",
            stacklevel=3,
        )
    rng = numpy_rng(seed, "etf/mask")
    for _ in range(REDRAWS):
        kept = np.ones((classes, dim), dtype=bool)
        kept.flat[rng.permutation(classes * dim)[:zeros]] = False
        if not _faults(kept):
            return torch.from_numpy(kept)
    return torch.from_numpy(_repair(kept, rng))


def _faults(kept: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows without a common entry; a row with fewer than two entries is paired with itself."""
    common = kept.astype(np.int64) @ kept.T.astype(np.int64)
    common[np.diag_indices(len(kept))] -= 1
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(common < 1))]


def _repair(kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move entries until no pair of rows is without a common one; the number of zeros stays.

    Raises:
        ArgumentError: if that cannot be done.
    """
    total = kept.sum()
    while faults := _faults(kept):
        i, j = faults[0]
        options = np.flatnonzero(kept[i] ^ kept[j] if i != j else ~kept[i])
        if not len(options):
            break
        kept[[i, j], rng.choice(options)] = True
    for spot in rng.permutation(np.flatnonzero(kept)):
        if kept.sum() == total:
            break
        kept.flat[spot] = False
        if _faults(kept):
            kept.flat[spot] = True
    if kept.sum() != total or _faults(kept):
        raise ArgumentError(
            f"sparsity: no support of {total} entries lets all {len(kept)} classes overlap in {kept.shape[1]} "
            "features; give a smaller sparsity"
        )
    return kept


def _check_mask(kept: Tensor) -> None:
    empty = torch.nonzero(~kept.any(dim=1))[:, 0].tolist()
    if len(empty):
        raise ArgumentError(f"mask: class {empty[0]} keeps no entry; every class needs at least one")
    apart = [pair for pair in _faults(kept.numpy()) if pair[0] != pair[1]]
    if apart:
        warnings.warn(
            f"mask: classes {apart[0][0]} and {apart[0][1]} have no entry in common and stay at 90 degrees"
            + (f" ({len(apart)} such pairs)" if len(apart) > 1 else ""),
            stacklevel=3,
        )
