"""Distances between two sets of embeddings, and losses on logits, as FRAug uses them (Chen et al. 2023).

All are means, so the sets may differ in size where the distance does not pair rows; gradients flow to both arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = 5  # bandwidths b0 * 2^i
Distance = Callable[[Tensor, Tensor], Tensor]


def mmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of x (n, D) and y (m, D) under ``sum_{i=0..4} exp(-|a-b|^2 / (b0 2^i))``.

    Biased estimate, diagonal included: ``mean kxx + mean kyy - 2 mean kxy``. ``b0`` is a quarter of the mean squared
    distance over pairs of distinct rows of both sets together, and no gradient passes through it; 0 if all rows are
    equal. One (n+m, n+m) matrix of distances and one exponential: the other kernels are its powers 2, 4, 8, 16.
    """
    n, both = len(x), torch.cat((x, y))
    both = both - both.detach().mean(0)  # distances stay, rounding shrinks
    norms = both.square().sum(1)
    apart = torch.ones((len(both), len(both)), dtype=both.dtype, device=both.device).fill_diagonal_(0)
    squared = torch.addmm(norms[:, None] + norms, both, both.T, alpha=-2).clamp(min=0) * apart
    b0 = squared.detach().sum() / (len(both) ** 2 - len(both)) / 4
    power = torch.exp(-squared / (2 ** (KERNELS - 1) * torch.where(b0 > 0, b0, torch.ones_like(b0))))
    kernel = power
    for _ in range(KERNELS - 1):
        power = power.square()
        kernel = kernel + power
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def mmd_moments(x: Tensor, y: Tensor) -> Tensor:
    """Squared differences of means (over D) and of unbiased covariances (over D x D) of x (n, D) and y (m, D)."""
    first = (x.mean(0) - y.mean(0)).square().mean()
    return first + (_covariance(x) - _covariance(y)).square().mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of paired rows, x and y (n, D)."""
    return F.l1_loss(x, y)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of paired rows, x and y (n, D)."""
    return F.mse_loss(x, y)


DISTANCES: Mapping[str, Distance] = {"MMD_kernel": mmd_kernel, "MMD": mmd_moments, "L1": l1, "L2": l2}


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the softmax of ``logits`` (n, C), in nats."""
    log = F.log_softmax(logits, dim=-1)
    return -(log.exp() * log).sum(-1).mean()


def non_saturating(logits: Tensor, y: Tensor, smoothing: float = 0.1) -> Tensor:
    """``-sum_c q_c log(1 - p_c + 1e-12)``, mean over n: logits (n, C), labels y (n,) smoothed to q.

    ``q`` is ``1 - smoothing`` on the label plus ``smoothing / C`` on every class.
    """
    q = F.one_hot(y, logits.shape[-1]).to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(q * torch.log(1 - F.softmax(logits, dim=-1) + 1e-12)).sum(-1).mean()


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)
