"""FedLabel's local rule: of the received and the own model, the one that is surer labels each sample. Cho, Joshi,
Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning with Limited Labels, ICCV 2023.

Usable by themselves: ``confidence``, ``select``, ``fedlabel_loss``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    inputs,
    joined,
    look,
    nothing,
    refuse_accumulation,
    true_labels,
    unlabelled,
    upcoming,
)
from clients.sgd import SGDClient
from fedsim.data.local import Batch, LocalData
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job

KL = ("teacher_student", "student_teacher")
KL_INPUTS = ("strong", "plain")
DENOMINATORS = ("kept", "batch")
TEACHERS = ("both", "local", "global")
WEIGHTINGS = ("used", "samples", "uniform")


def _variance(z: Tensor) -> Tensor:
    return z.softmax(dim=1).var(dim=1, correction=0)


def _negentropy(z: Tensor) -> Tensor:
    log = z.log_softmax(dim=1)
    return (math.log(z.shape[1]) + (log.exp() * log).sum(dim=1)).clamp_min(0)


def _logit_variance(z: Tensor) -> Tensor:
    return z.var(dim=1, correction=0)


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "variance": _variance,
    "entropy": _negentropy,
    "logit_variance": _logit_variance,
}


def confidence(z: Tensor, kind: str = "variance") -> Tensor:
    """h (B,) of logits (B, C), 0 where all classes are as likely.

    ``variance`` over the classes of the probabilities; ``entropy``: how much less than the largest it is, ``log C -
    H``; ``logit_variance`` over the classes of the logits themselves.
    """
    return CONFIDENCES[kind](z)


class Chosen(NamedTuple):
    """What the two teachers say of each of B samples."""

    label: Tensor  # (B,) int64
    keep: Tensor  # (B,) bool: surer than beta
    from_global: Tensor  # (B,) bool: by the received model
    agree: Tensor  # (B,) bool: kept, and the other teacher gives the same label
    strength: Tensor  # (B,) lam_x, of the divergence; 0 where they do not agree
    other: Tensor  # (B, C) log probabilities of the teacher that was not chosen

    def at(self, rows: Tensor) -> Chosen:
        """Those of some samples, by position or mask."""
        return Chosen(*(part[rows] for part in self))


def select(
    z_global: Tensor, z_local: Tensor, beta: float = 0.5, lam0: float = 1.0, kind: str = "variance"
) -> Chosen:
    """Which teacher labels each sample, from the logits (B, C) of both: the received model where h is larger, else the
    local one; kept where its largest probability exceeds ``beta``; ``lam_x = lam0 h(other) / h(chosen)``."""
    h_global, h_local = confidence(z_global, kind), confidence(z_local, kind)
    from_global = h_global > h_local
    first = from_global[:, None]
    best, other = torch.where(first, z_global, z_local), torch.where(first, z_local, z_global)
    sure, label = best.softmax(dim=1).max(dim=1)
    keep = sure > beta
    agree = keep & (other.argmax(dim=1) == label)
    high, low = torch.where(from_global, h_global, h_local), torch.where(from_global, h_local, h_global)
    ratio = torch.where(high > 0, low / torch.where(high > 0, high, 1), 1)
    strength = torch.where(agree, lam0 * ratio, 0)
    return Chosen(label, keep, from_global, agree, strength, other.log_softmax(dim=1))


def fedlabel_loss(
    z: Tensor, chosen: Chosen, *, plain: Tensor | None = None, kl: str = "teacher_student", count: int = 0
) -> Tensor:
    """``1/n sum [CE(s, y) + lam_x KL(s' || s)]`` of the student's logits ``z`` (n, C) on strong views of kept samples.

    ``plain`` (n, C): its logits on the samples as they are, which then stand in the divergence. ``count``: n, if not
    the samples given. 0 where nothing was kept.
    """
    log = z.log_softmax(dim=1)
    student = log if plain is None else plain.log_softmax(dim=1)
    p, q = (chosen.other, student) if kl == "teacher_student" else (student, chosen.other)
    divergence = (p.exp() * (p - q)).sum(dim=1)
    rows = F.nll_loss(log, chosen.label, reduction="none") + chosen.strength * divergence
    return rows.sum() / (count or max(len(z), 1))


@dataclass(frozen=True, kw_only=True)
class FedLabelClient(SGDClient):
    """Two branches from the received ``w``: SGD on labelled samples gives ``w_L``; then, from ``w`` again, SGD on the
    unlabelled ones that the surer of ``w`` and ``w_L`` labels. The update is the sum of both moves.

    BatchNorm's statistics are the mean of both branches'. A branch without a step has no part in either.
    """

    grad_only = False

    beta: float
    lam0: float
    confidence: str
    kl: str
    kl_input: str
    denominator: str
    view: str
    unlabelled_steps: int | None
    teachers: str = "both"

    def fit(self, job: Job) -> Update:
        """Both branches."""
        refuse_accumulation(job, "FedLabel")
        w, model, own = job.start(), job.model, unlabelled(job)
        local = (
            job.local if self.unlabelled_steps is None else replace(job.local, steps=self.unlabelled_steps)
        )
        rows, z_global = torch.zeros(0, dtype=torch.long), None
        if own is not None:
            job.local, first = local, job.local
            rows = torch.unique(upcoming(job, own))
            job.local = first
            z_global = look(job, w, inputs(own, rows)) if len(rows) else None
        for batch in job.batches():
            w = job.descend(w, batch)
        used, trained = job.meter.samples, w.clone()
        if not used and z_global is None:
            raise nothing(job)
        statistics, report, tally = model.buffers.clone(), job.report(), Tally()
        if own is not None and z_global is not None:
            z_local = look(job, w, inputs(own, rows)) if used else z_global
            job.restart()
            job.local = local
            w = job.start()
            self._unlabelled(job, w, own, rows, self._chosen(z_global, z_local, own, rows), tally)
        if not used + tally.kept:
            raise Refusal("no labelled samples, and no pseudo label above beta")
        update = self._merged(job, w, trained if used else None, statistics, bool(tally.kept))
        weight = {"used": used + tally.kept, "samples": len(job.data) + len(own or ()), "uniform": 1}
        second = job.report() if tally.kept else {}
        report = (report or second) | {f"unlabelled/{k}": v for k, v in second.items()}
        return Update(
            {"delta": update},
            weight=float(weight[self.weighting]),
            metrics={**report, **tally.metrics()},
            guesses=tally.guesses,
        )

    def _chosen(self, z_global: Tensor, z_local: Tensor, own: LocalData, rows: Tensor) -> Chosen:
        """What the teachers say of the samples at ``rows``: both, or one alone, which nobody can agree with; where true
        labels are told, those."""
        alone = {"both": None, "local": z_local, "global": z_global}[self.teachers]
        pair = (z_global, z_local) if alone is None else (alone, alone)
        chosen = select(*pair, self.beta, self.lam0, self.confidence)
        truth, never = true_labels(own), torch.zeros_like(chosen.keep)
        if truth is None and alone is None:
            return chosen
        chosen = chosen._replace(agree=never, strength=chosen.strength * 0)
        if truth is None:
            return chosen._replace(from_global=never | (self.teachers == "global"))
        return chosen._replace(label=truth[rows], keep=~never, from_global=never)

    def _unlabelled(
        self, job: Job, w: Tensor, own: LocalData, rows: Tensor, chosen: Chosen, tally: Tally
    ) -> None:
        """The unlabelled branch, on ``w`` (d,) in place; ``chosen`` are the samples at ``rows``, ascending."""
        whole = bool(job.layout.batch_norm)  # its statistics are those of the batch as it was drawn
        for batch in job.batches(UNLABELLED, data=Positions.of(own)):
            at, found = batch.y, chosen.at(torch.searchsorted(rows, batch.y))
            keep, size = found.keep.cpu(), len(at)
            kept = found.at(keep)
            tally.add(
                size,
                at[keep],
                kept.label.cpu(),
                from_global=int(kept.from_global.sum()),
                agree=int(kept.agree.sum()),
            )
            if len(kept.label):
                self._step(job, w, own.read(at if whole else at[keep]), kept, keep if whole else None, size)

    def _step(
        self, job: Job, w: Tensor, batch: Batch, kept: Chosen, mask: Tensor | None, size: int
    ) -> Tensor:
        """One step on the samples ``kept`` of a batch of ``size``; those of ``batch`` at ``mask``, if it has more."""
        plain, n = self.kl_input == "plain", batch.size
        x = job.view(self.view, Batch(batch.x)).x

        def loss(output: Any, y: Any) -> Tensor:
            z = as_logits(output)
            parts = [z[:n], z[n:] if plain else None]
            if mask is not None:
                parts = [None if part is None else part[mask] for part in parts]
            strong, as_is = parts
            assert strong is not None
            count = size if self.denominator == "batch" else 0
            return fedlabel_loss(strong, kept, plain=as_is, kl=self.kl, count=count)

        return job.descend(w, Batch(joined(x, batch.x) if plain else x), loss=loss)

    def _merged(
        self, job: Job, w: Tensor, trained: Tensor | None, statistics: Tensor, stepped: bool
    ) -> Tensor:
        """The sum (d,) of both branches' moves; ``w`` (d,) is the resident vector, ``trained`` (d,) that of the
        labelled branch with ``statistics`` (b,)."""
        model = job.model
        if trained is None:
            return job.delta(w)
        if not stepped:
            model.buffers.copy_(statistics)
            return job.delta(w.copy_(trained))
        model.buffers.add_(statistics).div_(2)
        moved = trained.sub_(job.anchor)
        total = torch.sub(w, job.anchor).add_(moved)
        job.delta(w.add_(moved))  # notes what stays with the client
        return job.shared(total)
