"""Clusters of equal size by Sinkhorn's iteration: how FedoSSL's clients and server group features.

Zhang, Guo, Xu, Guo, Luo, Guo: Towards Unbiased Training in Federated Open-world Semi-supervised Learning, ICML 2023,
after the clustering of Orchestra (Lubana, Tang, Kawsar, Dick, Mathur 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 25.0  # scores are multiplied by it
CLOSE = 0.01  # the iteration ends where the column factors change by less in sum, relative to themselves
LOOK = 10  # iterations between looks
TEMPERATURE = 0.1  # of assignments to global centroids
LOCAL_ROUNDS, LOCAL_ITERATIONS = 5, 10


def sinkhorn(scores: Tensor, iterations: int, sharpness: float = SHARPNESS) -> Tensor:
    """Assignments (N, K) of N rows to K clusters of equal size, from ``scores`` (N, K); rows sum to 1.

    ``P = softmax(sharpness scores)'``; alternately ``r = (1/K) / (P c)`` and ``c = (1/N) / (r' P)'``, from uniform
    ``c``, at most ``iterations`` times; ended where ``sum |c_old / c_new - 1| < 0.01``, which the first of every ten
    looks at. The result is ``N diag(c) P' diag(r)``.
    """
    n, k = scores.shape
    shares = F.softmax(sharpness * scores, dim=1)  # P', (N, K)
    columns = shares.new_full((n,), 1 / n)
    rows = shares.new_full((k,), 1 / k)
    for i in range(iterations):
        rows = (1 / k) / torch.mv(shares.T, columns)
        new = (1 / n) / torch.mv(shares, rows)
        close = i % LOOK == 0 and float((columns / new - 1).abs().nansum()) < CLOSE
        columns = new
        if close:
            break
    return shares * rows * (columns * n)[:, None]


def local_centroids(memory: Tensor, start: Tensor) -> Tensor:
    """Centroids (L, D) of ``memory`` (n, D) of unit rows, from ``start`` (L, D), L of its rows.

    Five times every row goes to the largest of its assignments, and every centroid to the unit mean of its rows; one
    without rows keeps its value.
    """
    centroids = start
    for _ in range(LOCAL_ROUNDS):
        nearest = sinkhorn(memory @ centroids.T, LOCAL_ITERATIONS).argmax(1)
        own = F.one_hot(nearest, len(centroids)).to(memory)
        sums = own.T @ memory
        there = (own.sum(0) > 0) & (sums.norm(dim=1) > 0)
        centroids = torch.where(there[:, None], F.normalize(sums, dim=1), centroids)
    return centroids


def log_assignments(z: Tensor, centroids: Tensor) -> Tensor:
    """``log q(z; m)`` (B, C), ``q = softmax(z/|z| . m' / 0.1)``, of features (B, D) and centroids m (C, D)."""
    return F.log_softmax(F.normalize(z, dim=1) @ centroids.T / TEMPERATURE, dim=1)
