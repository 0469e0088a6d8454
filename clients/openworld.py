"""FedoSSL's local objective: what is learned where some classes have labels and others nobody has named.

Zhang, Guo, Xu, Guo, Luo, Guo: Towards Unbiased Training in Federated Open-world Semi-supervised Learning, ICML 2023,
section 4; margin and entropy are ORCA's (Cao, Brbić, Leskovec 2022), on which the authors' code stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.sinkhorn import log_assignments

FORMS = ("printed", "inverse", "flat")
PARTNERS = ("nearest", "class")
SURE = 0.95  # assignments above it are labels, with ``hard``
MARGIN, MOST = 10.0, 0.5  # logits that the margin is at full uncertainty, and where uncertainty is cut
SMALLEST = 1e-8  # shares below it count as much, in the entropy


class TwoViews(NamedTuple):
    """What the model makes of two views of a batch: features (B, D) and logits (B, C) of the first and the second."""

    z: Tensor
    logits: Tensor
    z2: Tensor
    logits2: Tensor


class Constants(NamedTuple):
    """What is constant in a round: weights of classes rho (C,), mean uncertainty u, centroids m (C, D) if there are
    any, and whether they count against the predictions yet (L_ce)."""

    rho: Tensor
    uncertainty: float
    centroids: Tensor | None = None
    predictions: bool = True


def pairwise(logits: Tensor, partners: Tensor) -> Tensor:
    """``-mean log <p, p'>`` of predictions p = softmax(logits) (B, C) and those of their partners."""
    both = F.log_softmax(logits, dim=1) + F.log_softmax(partners, dim=1)
    return -both.logsumexp(1).mean()


def class_weights(counts: Tensor, tau: float, form: str = "printed") -> Tensor:
    """``rho`` (C,) from how often each class is predicted (C,).

    ``printed``: ``tau^(1 - n_c / n_max)``, which grows with n_c; ``inverse``: ``tau^(n_c / n_max)``; ``flat``: 1.
    """
    share = counts / counts.max().clamp(min=1)
    if form == "flat":
        return torch.ones_like(share)
    return tau ** (share if form == "inverse" else 1 - share)


def regulariser(logits: Tensor, rho: Tensor) -> Tensor:
    """R, the mean of ``rho_c (1 - max p)`` with c = argmax p over rows (B, C)."""
    most, c = F.softmax(logits, dim=1).max(1)
    return (rho[c] * (1 - most)).mean()


def cross(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Mean cross entropy ``H(q, p) = -sum q log p`` over rows (B, C)."""
    return -(log_q.exp() * log_p).sum(1).mean()


def prediction_calibration(z: Tensor, logits: Tensor, centroids: Tensor, hard: bool = False) -> Tensor:
    """L_ce, the mean of ``H(q(z; m), p(z))`` without a gradient through q.

    ``hard``: q is its largest class, of the rows alone where that is above 0.95.
    """
    with torch.no_grad():
        log_q = log_assignments(z, centroids)
    if not hard:
        return cross(log_q, F.log_softmax(logits, dim=1))
    most, label = log_q.exp().max(1)
    sure = most > SURE
    if not bool(sure.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits[sure], label[sure])


def cluster_calibration(z: Tensor, partners: Tensor, centroids: Tensor) -> Tensor:
    """L_cluster, the mean of ``H(q(z; m), q(z'; m))`` of features (B, D) and those of their partners."""
    return cross(log_assignments(z, centroids), log_assignments(partners, centroids))


def supervised(logits: Tensor, y: Tensor, uncertainty: float = 0.0) -> Tensor:
    """L_s, cross entropy (B, C), (B,) with ``10 min(u, 0.5)`` added to the logit of the true class."""
    if uncertainty:
        logits = logits + MARGIN * min(uncertainty, MOST) * F.one_hot(y, logits.shape[1])
    return F.cross_entropy(logits, y)


def mean_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of a batch (B, C), nats."""
    mean = F.softmax(logits, dim=1).mean(0).clamp(min=SMALLEST)
    return -(mean * mean.log()).sum()


def nearest(z: Tensor) -> Tensor:
    """For each row of features (B, D) the other row (B,) with the largest cosine; a single row has itself."""
    unit = F.normalize(z, dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)


def of_the_same_class(partner: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """``partner`` (B,) where a labelled row (``y`` (B,) from 0; below: without label) has a random other row of its
    class instead, if there is one."""
    alike = (y[:, None] == y) & (y >= 0)[:, None]
    alike.fill_diagonal_(False)
    drawn = torch.rand(alike.shape, generator=generator).to(y.device).masked_fill_(~alike, -1).argmax(1)
    return torch.where(alike.any(1), drawn, partner)


@dataclass(frozen=True, kw_only=True)
class OpenObjective:
    """``L = L_s + alpha L_u + beta R + gamma (ce_weight L_ce + cluster_weight L_cluster)``, minus ``H(mean p)``.

    ``margin``: L_s has ORCA's margin; ``entropy``: that of the mean prediction is subtracted; ``hard``, ``tau`` and
    ``form``: see ``prediction_calibration`` and ``class_weights``; ``partner``: of labelled rows, the nearest row as of
    others, or a random one of their ``class``.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    tau: float = 0.2
    form: str = "printed"
    margin: bool = True
    entropy: bool = True
    hard: bool = False
    ce_weight: float = 1.0
    cluster_weight: float = 1.0
    partner: str = "nearest"

    @property
    def calibrates(self) -> bool:
        """Whether global centroids have a part in it."""
        return self.gamma * (self.ce_weight + self.cluster_weight) > 0

    def partners(self, z: Tensor, y: Tensor, draw: Callable[[], torch.Generator]) -> Tensor:
        """Each row's partner (B,), found without gradient; ``draw`` gives a generator if one is needed."""
        found = nearest(z.detach())
        return found if self.partner == "nearest" else of_the_same_class(found, y, draw())

    def value(self, views: TwoViews, y: Tensor, partner: Tensor, known: Constants) -> Tensor:
        """L of a batch; ``y`` (B,) are classes, negative of rows without label, ``partner`` (B,) other rows."""
        z, logits, z2, logits2 = views
        labelled = y >= 0
        some = int(labelled.sum())
        total = self.alpha * pairwise(logits, logits2[partner])
        if some:
            own = labelled if some < len(y) else slice(None)
            total = total + supervised(logits[own], y[own], known.uncertainty if self.margin else 0.0)
        rest = logits[~labelled] if some else logits
        if self.beta and len(rest):
            total = total + self.beta * regulariser(rest, known.rho)
        if self.entropy:
            total = total - mean_entropy(logits)
        m = known.centroids
        if m is None or not self.calibrates:
            return total
        if known.predictions and self.ce_weight and len(rest):
            unlabelled = z[~labelled] if some else z
            found = prediction_calibration(unlabelled, rest, m, self.hard)
            total = total + self.gamma * self.ce_weight * found
        if self.cluster_weight:
            total = total + self.gamma * self.cluster_weight * cluster_calibration(z, z2[partner], m)
        return total
