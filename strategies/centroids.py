"""Global centroids of FedoSSL: what the server makes of the clients' local ones, and which id each of them has.

Zhang, Guo, Xu, Guo, Luo, Guo: Towards Unbiased Training in Federated Open-world Semi-supervised Learning, ICML 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.sinkhorn import TEMPERATURE, sinkhorn
from fedsim.task.matching import matched

ITERATIONS = 100  # of Sinkhorn, at most
RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def unit_rows(classes: int, dim: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions (C, D)."""
    drawn = torch.randn((classes, dim), generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1).to(like)


def global_centroids(local: Tensor, start: Tensor, steps: int = 500) -> Tensor:
    """Centroids m (C, D), unit rows, of the clients' ``local`` ones Z (N, D), from ``start`` (C, D).

    ``steps`` of SGD (rate 0.01, momentum 0.9, weight decay 1e-4) on ``-mean cos(S, softmax(Zhat m' / 0.1))``, rows of
    m to unit length after each; ``S = sinkhorn(Z m')`` has no gradient, Zhat has unit rows.
    """
    m, unit = start.clone(), F.normalize(local, dim=1)
    velocity = torch.zeros_like(m)
    for _ in range(steps):
        wanted = sinkhorn(local @ m.T, ITERATIONS)
        p = F.softmax(unit @ m.T / TEMPERATURE, dim=1)
        length = p.norm(dim=1, keepdim=True)
        wanted = wanted / wanted.norm(dim=1, keepdim=True)
        cosine = (wanted * p).sum(1, keepdim=True) / length
        slope = (cosine * p / length - wanted) / (length * len(p))  # of the loss, by p
        slope = p * (slope - (slope * p).sum(1, keepdim=True)) / TEMPERATURE  # by Zhat m'
        gradient = (slope.T @ unit).add_(m, alpha=DECAY)
        velocity.mul_(MOMENTUM).add_(gradient)
        m = F.normalize(m - RATE * velocity, dim=1)
    return m


def aligned(m: Tensor, means: Tensor, present: Tensor) -> Tensor:
    """``m`` (C, D) in another order: the row matched to the mean of class c (C, D), where ``present`` (C,), is row c.

    One to one, of the largest sum of cosines; rows without a match keep their order in the places that are left.
    """
    classes = torch.nonzero(present).flatten()
    if not len(classes):
        return m
    cosines = F.normalize(means[classes], dim=1) @ F.normalize(m, dim=1).T
    which, row = map(torch.from_numpy, matched(cosines.cpu().double().numpy()))
    order = torch.full((len(m),), -1)
    order[classes.cpu()[which]] = row
    free = torch.ones(len(m), dtype=torch.bool)
    free[row] = False
    order[order < 0] = torch.nonzero(free).flatten()
    return m[order.to(m.device)]
