"""Orthogonal regularisation by spectral norms: how far weight matrices are from orthogonal ones, for FedSTO's second
phase (Kim et al. 2023, section 4.3).

Usable by themselves: ``omega``, ``orthogonality``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STEPS = 5  # of power iteration, for each step of training


def omega(theta: Tensor, vector: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """``sigma(theta^T theta - I) + sigma(theta theta^T - I)`` () of a kernel, read as (out, in kh kw); sigma is the
    largest singular value.

    On its smaller side, of n rows, sigma is ``max |s_i^2 - 1|`` over the singular values s_i, exactly; on the other,
    which lacks rank, the same but at least 1. The gradient is that of the extreme s_i, ``2 s sign(s^2 - 1) u v^T``.
    With ``vector`` (n,), which is replaced in place, power iteration takes the place of the exact eigenvectors: keep it
    from step to step.
    """
    matrix = theta.flatten(1)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    with torch.no_grad():
        u = _extreme(matrix) if vector is None else _iterated(matrix, vector, steps)
    off = ((u @ matrix).square().sum() - u.square().sum()).abs()
    return off + (off if matrix.shape[0] == matrix.shape[1] else off.clamp(min=1))


def orthogonality(
    thetas: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None, steps: int = STEPS
) -> Tensor:
    """The sum () of ``omega`` over matrices by name, in full precision; ``vectors`` for power iteration."""
    device = next(iter(thetas.values())).device.type
    with torch.autocast(device, enabled=False):
        each = [omega(t, None if vectors is None else vectors[k], steps) for k, t in thetas.items()]
    return torch.stack(each).sum()


def starting(thetas: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Unit vectors (n,) to begin power iteration with, n each matrix's smaller side."""
    out = {}
    for name, theta in thetas.items():
        drawn = torch.randn(min(theta.flatten(1).shape), generator=generator, dtype=torch.float64)
        out[name] = (drawn / drawn.norm()).to(theta)
    return out


def _extreme(matrix: Tensor) -> Tensor:
    """The unit vector (n,) at which ``|matrix^T u|^2`` is furthest from 1, of ``matrix`` (n, m), n <= m."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    worst: Tensor = vectors[:, (values - 1).abs().argmax()]
    return worst


def _iterated(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """The same by power iteration on ``matrix matrix^T - I``."""
    for _ in range(steps):
        image = matrix @ (vector @ matrix) - vector
        norm = image.norm()
        if norm > 0:  # else all is orthogonal
            vector.copy_(image / norm)
    return vector.clone()
