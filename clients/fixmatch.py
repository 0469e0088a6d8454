"""Local rules on FedAvg that train strong views on what the model says of weak ones: FixMatch (Sohn et al. 2020) and
UDA (Xie et al. 2020), on samples without labels beside labelled ones, or alone.

Usable by themselves: ``fixmatch``, ``uda``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.pseudo import (
    UNLABELLED,
    Positions,
    Tally,
    as_logits,
    extra_batches,
    joined,
    look,
    nothing,
    refuse_accumulation,
    true_labels,
    unlabelled,
)
from clients.sgd import SGDClient
from fedsim.data.local import Batch, LocalData
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


class Unsupervised(NamedTuple):
    """The loss () of a batch of unlabelled samples, which of them were kept (B,), and their labels (B,)."""

    loss: Tensor
    mask: Tensor
    label: Tensor


def fixmatch(z_weak: Tensor, z_strong: Tensor, tau: float) -> Unsupervised:
    """``1/B sum 1(max p >= tau) CE(z_strong, argmax p)``, p of logits ``z_weak`` (B, C), which get no gradient."""
    mask, label = sure(z_weak, tau)
    return Unsupervised(hard(z_weak, z_strong)[mask].sum() / len(mask), mask, label)


def uda(z_weak: Tensor, z_strong: Tensor, tau: float, temperature: float) -> Unsupervised:
    """``1/B sum 1(max p >= tau) KL(softmax(z_weak / T) || p_strong)``; the mask is by the p that is not sharpened."""
    mask, label = sure(z_weak, tau)
    return Unsupervised(soft(z_weak, z_strong, temperature)[mask].sum() / len(mask), mask, label)


def sure(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Whether the largest probability reaches ``tau`` (B,), which NaN does not, and its class (B,)."""
    p, label = z.detach().softmax(dim=1).max(dim=1)
    return p >= tau, label


def hard(z_weak: Tensor, z_strong: Tensor) -> Tensor:
    """Cross entropy (B,) with the weak view's class."""
    return F.cross_entropy(z_strong, z_weak.detach().argmax(dim=1), reduction="none")


def soft(z_weak: Tensor, z_strong: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(z_weak / T) || p_strong)`` (B,)."""
    target = (z_weak.detach() / temperature).log_softmax(dim=1)
    return (target.exp() * (target - z_strong.log_softmax(dim=1))).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class FixMatchClient(SGDClient):
    """Each step: cross entropy of a labelled batch in the weak view, plus ``lam`` times FixMatch's loss of ``mu`` times
    as many unlabelled samples, in one pass. The labeller is the present model (``local``) or the received one
    (``global``).

    Without unlabelled samples, or with ``tau`` above 1 or ``lam = 0``, it is SGD on the labelled ones; without labelled
    ones the steps are those of the configured work on the unlabelled ones.
    """

    grad_only = False

    tau: float
    lam: float
    mu: int
    labeller: str
    weak: str | None
    strong: str

    def rows(self, z_weak: Tensor, z_strong: Tensor) -> Tensor:
        """Loss (k,) of samples that were kept."""
        return hard(z_weak, z_strong)

    def fit(self, job: Job) -> Update:
        """Joint steps."""
        refuse_accumulation(job, type(self).__name__.removesuffix("Client"))
        own, steps, tally = unlabelled(job), job.num_steps, Tally()
        size = self.mu * job.local.batch_size
        count = len(job.data) + len(own or ())
        if self.tau > 1 or self.lam == 0:
            own = None
        w = job.start()
        statistics = job.model.buffers.clone()
        if steps and own is not None:
            for batch, at in zip(job.batches(), extra_batches(job, own, size, steps), strict=False):
                w = self._joint(job, w, self._weakly(job, batch), own, at, statistics, tally)
        elif steps:
            for batch in job.batches():
                w = job.descend(w, self._weakly(job, batch))
        elif own is not None:
            job.local = replace(job.local, batch_size=size)
            for batch in job.batches(UNLABELLED, data=Positions.of(own)):
                w = self._joint(job, w, None, own, batch.y, statistics, tally)
        if not job.steps:
            raise nothing(job)
        weight = float(count) if self.weighting == "samples" else 1.0
        return tally.update(job, w, weight)

    def _weakly(self, job: Job, batch: Batch) -> Batch:
        return batch if self.weak is None else job.view(self.weak, batch)

    def _joint(
        self,
        job: Job,
        w: Tensor,
        batch: Batch | None,
        own: LocalData,
        at: Tensor,
        statistics: Tensor,
        tally: Tally,
    ) -> Tensor:
        """One step on the labelled ``batch``, if there is one, and the unlabelled samples at the positions ``at``."""
        shown = self._weakly(job, Batch(own.read(at).x)).x
        received = self.labeller == "global"
        z = look(job, job.anchor if received else w, [shown], statistics if received else None)
        mask, label = sure(z, self.tau)
        if (truth := true_labels(own)) is not None:
            mask, label = torch.ones_like(mask), truth[at].to(label.device)
            z = torch.full_like(z, -1e4).scatter(1, label[:, None], 1e4)  # a certain teacher
        keep = mask.cpu()
        lost = int(torch.isnan(z).any(dim=1).sum())
        tally.add(len(at), at[keep], label[mask].cpu(), **({"nan": lost} if lost else {}))
        whole = bool(job.layout.batch_norm)  # its statistics are those of the batch as it was drawn
        rows = at if whole else at[keep]
        if not keep.any() and batch is None:
            return w
        if not len(rows):
            assert batch is not None
            return job.descend(w, batch)
        strong = job.view(self.strong, Batch(own.read(rows).x)).x
        y, size = (None, len(at)) if batch is None else (batch.y, len(at))

        def loss(output: Any, y: Any) -> Tensor:
            logits = as_logits(output)
            n = len(logits) - len(rows)
            own = logits[n:][mask] if whole else logits[n:]
            unsupervised = self.lam * self.rows(z[mask], own).sum() / size
            return job.task.loss(logits[:n], y) + unsupervised if n else unsupervised

        return job.descend(w, Batch(joined(batch and batch.x, strong), y), loss=loss)


@dataclass(frozen=True, kw_only=True)
class UDAClient(FixMatchClient):
    """The same with sharpened probabilities in the place of labels."""

    temperature: float

    def rows(self, z_weak: Tensor, z_strong: Tensor) -> Tensor:
        """Divergence (k,) from the sharpened weak view."""
        return soft(z_weak, z_strong, self.temperature)
