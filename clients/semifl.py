"""SemiFL's local rule: the received model labels the client's samples once; strong views of the sure ones and mixtures
with any of them are trained. Diao, Ding, Tarokh: SemiFL: Semi-Supervised Federated Learning for Unlabeled Clients with
Alternate Training, NeurIPS 2022.

Usable by itself: ``semifl_loss``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.fixmatch import sure
from clients.pseudo import (
    UNLABELLED,
    Positions,
    Tally,
    as_logits,
    extra_batches,
    inputs,
    joined,
    look,
    refuse_accumulation,
    true_labels,
    unlabelled,
)
from clients.sgd import SGDClient
from fedsim.data.local import Batch, LocalData
from fedsim.data.trees import join, leaves
from fedsim.errors import ClientError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.rng import numpy_rng

ENDLESS = 1 << 60  # steps


def semifl_loss(
    z_fix: Tensor, z_mix: Tensor, y_fix: Tensor, y_mix: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """``CE(z_fix, y_fix)`` and ``l CE(z_mix, y_fix) + (1 - l) CE(z_mix, y_mix)``, means over B, with ``share`` l."""
    first, second = F.cross_entropy(z_mix, y_fix), F.cross_entropy(z_mix, y_mix)
    return F.cross_entropy(z_fix, y_fix), share * first + (1 - share) * second


@dataclass(frozen=True, kw_only=True)
class SemiFLClient(SGDClient):
    """``D_f``: samples whose label has at least ``tau``, fixed for the round; ``D_m``: as many, drawn with replacement
    from all. A step takes a batch of each, ``l ~ Beta(alpha, alpha)``, and the mixture ``l x_f + (1 - l) x_m`` of weak
    views.

    A client of which no sample is sure refuses.
    """

    grad_only = False

    tau: float
    alpha: float
    weak: str | None
    strong: str

    def fit(self, job: Job) -> Update:
        """Labels, then training on them."""
        refuse_accumulation(job, "SemiFL")
        own, tally = unlabelled(job), Tally()
        if own is None:
            raise Refusal("no unlabelled samples")
        w, n = job.start(), len(own)
        mask, label = sure(look(job, w, inputs(own, torch.arange(n))), self.tau)
        mask, label = mask.cpu(), label.cpu()
        if (truth := true_labels(own)) is not None:
            mask, label = torch.ones_like(mask), truth.cpu()
        fixed = mask.nonzero().flatten()
        tally.add(n, fixed, label[fixed])
        if not len(fixed):
            raise Refusal(f"none of its {n} samples has a pseudo label of at least {self.tau}")
        if not all(leaf.is_floating_point() for leaf in leaves(own.read(fixed[:1]).x)):
            raise ClientError(
                "SemiFL mixes inputs, which must be numbers, not tokens; type strategy=fixmatch"
            )
        mixed = torch.randint(n, (len(fixed),), generator=job.rng("mixed"))
        shares = numpy_rng(job.seed, "semifl/shares", job.round, job.client)
        others = self._others(job, own, mixed)
        for batch in job.batches(UNLABELLED, data=_part(own, fixed)):
            at, other = fixed[batch.y], mixed[next(others)]
            w = self._step(job, w, own, at, other, label, float(shares.beta(self.alpha, self.alpha)))
        if not job.steps:
            raise Refusal("one sample with a pseudo label, too few for BatchNorm")
        weight = float(n) if self.weighting == "samples" else 1.0
        return tally.update(job, w, weight)

    def _others(self, job: Job, own: LocalData, mixed: Tensor) -> Any:
        """Positions in ``mixed`` of one batch after the other, for as long as they are asked for."""
        smallest = 2 if job.layout.batch_norm else 1
        return extra_batches(job, _part(own, mixed), job.local.batch_size, ENDLESS, "mixed/order", smallest)

    def _step(
        self, job: Job, w: Tensor, own: LocalData, at: Tensor, other: Tensor, label: Tensor, share: float
    ) -> Tensor:
        """One step on the samples ``at`` (B,) and those to be mixed in, ``other`` (B,)."""
        device = w.device
        y_fix, y_mix, n = label[at].to(device), label[other].to(device), len(at)
        plain = Batch(own.read(at).x)
        strong = job.view(self.strong, plain).x
        pair = [self._weakly(job, batch) for batch in (plain, Batch(own.read(other).x))]
        mixture = join(lambda parts: share * parts[0] + (1 - share) * parts[1], pair)

        def loss(output: Any, y: Any) -> Tensor:
            z = as_logits(output)
            first, second = semifl_loss(z[:n], z[n:], y_fix, y_mix, share)
            return first + second

        return job.descend(w, Batch(joined(strong, mixture), y_fix), loss=loss)

    def _weakly(self, job: Job, batch: Batch) -> Any:
        return (batch if self.weak is None else job.view(self.weak, batch)).x


def _part(own: LocalData, rows: Tensor) -> Positions:
    """Batches of positions among ``rows``."""
    return Positions.of(replace(own, index=own.index[rows]))
