"""Closed-form classifiers: what a client sends of its features, and how that adds up to the classifier of all.

He, Tang, Fang, Xu, et al.: AFL, a single-round analytic approach for federated learning with pre-trained models, CVPR
2025. Features ``X`` (n, d), one-hot labels ``Y`` (n, C); ``C_k = X'X + gamma I``, ``W_k = C_k^-1 X'Y``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.base import Client
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.models.split import features_of

BATCH = 1024


def moments(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """``X'X`` (d, d) and ``X'Y`` (d, C)."""
    return X.mT @ X, X.mT @ Y


def solution(X: Tensor, Y: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """``(C_k, W_k)``, the paper's message."""
    gram, cross = moments(X, Y)
    C = gram + gamma * torch.eye(len(gram), dtype=gram.dtype)
    return C, torch.linalg.solve(C, cross)


def packed(C: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (d, d), row by row, (d (d + 1) / 2,)."""
    i, j = torch.triu_indices(*C.shape)
    return C[i, j]


def unpacked(v: Tensor) -> Tensor:
    """The symmetric matrix of which ``packed`` is ``v``."""
    d = int(((8 * len(v) + 1) ** 0.5 - 1) / 2)
    i, j = torch.triu_indices(d, d)
    out = v.new_zeros(d, d)
    out[i, j] = v
    out[j, i] = v
    return out


@dataclass(frozen=True, kw_only=True)
class RidgeClient(Client):
    """Sends moments of its features or its own solution, in ``numbers`` (float64, float32); trains nothing.

    ``send``: ``moments`` ``(X'X, X'Y)``; ``solution`` ``(C_k, W_k)``. ``bias``: features get a 1 at the end.
    """

    grad_only = False

    send: str
    gamma: float
    bias: bool
    numbers: str = "float64"

    def fit(self, job: Job) -> Update:
        """``gram`` and ``cross``; with ``job.message``'s ``balance`` (C,) rows weigh what their class does."""
        if not len(job.data):
            raise Refusal("no samples")
        X, y = self.features(job)
        classes = int(job.values["classes"])  # type: ignore[arg-type]
        Y = F.one_hot(y, classes).to(X.dtype)
        if "balance" in job.message.arrays:
            root = job.message.arrays["balance"].double().cpu()[y].sqrt()[:, None]
            X, Y = X * root, Y * root
        kind = getattr(torch, self.numbers)
        if self.send == "moments":
            first, second = moments(X, Y)
        else:
            first, second = solution(X, Y, self.gamma)
        arrays = {"gram": packed(first).to(kind), "cross": second.reshape(-1).to(kind)}
        return Update(arrays, weight=len(job.data))

    def counts(self, job: Job) -> Update:
        """Samples per class, (C,) float64."""
        if not len(job.data):
            raise Refusal("no samples")
        return Update({"counts": job.class_counts.double()}, weight=len(job.data))

    def features(self, job: Job) -> tuple[Tensor, Tensor]:
        """``model.features`` of all own samples at the received model in float64, (n, d), and labels (n,)."""
        found, labels = [], []
        w = job.start()
        with job.model.measuring(w) as again:
            for rows in torch.split(torch.arange(len(job.data)), BATCH):
                again()
                batch = job.data.read(rows)
                found.append(features_of(job.model.module, batch.x).double().cpu())
                labels.append(batch.y.cpu())
        job.meter.forward(len(job.data))
        X = torch.cat(found)
        if self.bias:
            X = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
        return X, torch.cat(labels)
