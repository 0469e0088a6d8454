"""FedMatch's local rule: weights are a sum, one part for labelled samples and one for unlabelled ones, which the models
of similar clients help to label. Jeong, Yoon, Yang, Hwang: Federated Semi-Supervised Learning with Inter-Client
Consistency and Disjoint Learning, ICLR 2021.

Usable by itself: ``fedmatch_loss``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

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
    joined,
    look,
    nothing,
    refuse_accumulation,
    true_labels,
    unlabelled,
)
from clients.sgd import SGDClient
from fedsim import rng
from fedsim.data.local import Batch, LocalData, batches_per_epoch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.local.optimiser import LocalSteps


class Matched(NamedTuple):
    """The unsupervised loss () of a batch, which samples were kept (B,), and their labels (B,)."""

    loss: Tensor
    keep: Tensor
    label: Tensor


class Sparse(NamedTuple):
    """What does not travel: entries of psi of at most ``small``, and moves of at most ``change``."""

    small: float
    change: float

    def kept(self, psi: Tensor) -> Tensor:
        """``psi`` without its small entries."""
        return torch.where(psi.abs() > self.small, psi, 0.0)

    def moved(self, now: Tensor, before: Tensor) -> Tensor:
        """The move from ``before`` to ``now`` without what hardly moved."""
        move = now - before
        return torch.where(move.abs() > self.change, move, 0.0)


def sent_psi(name: str, psi: Tensor, size: int) -> dict[str, Tensor]:
    """``psi`` (d,) of ``size`` numbers as it travels down, an array of that name; places and values of what is not zero
    where that is shorter."""
    places = psi.nonzero().flatten()
    if len(places) * (4 + psi.element_size()) >= size * psi.element_size() or len(psi) > 2**31:
        return {name: psi}
    return {f"{name}/places": places.int(), f"{name}/values": psi[places]}


def received_psi(name: str, arrays: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
    """What ``sent_psi`` sent, (d,) as ``like`` is; ``None`` if it did not."""
    if f"{name}/places" not in arrays:
        return arrays.get(name)
    psi = torch.zeros_like(like)
    psi[arrays[f"{name}/places"].long()] = arrays[f"{name}/values"]
    return psi


def votes(z: Tensor, helpers: Tensor) -> Tensor:
    """The class (B,) that most of the own logits (B, C) and the helpers' (H, B, C) name; of several the lowest."""
    named = torch.cat([z[None], helpers]).argmax(dim=2)
    return F.one_hot(named, z.shape[1]).sum(dim=0).argmax(dim=1)


def consistency(z: Tensor, helpers: Tensor) -> Tensor:
    """``1/H sum_h mean KL(p_h || p)`` of the student's logits (B, C) and the helpers' (H, B, C); 0 without helpers."""
    if not len(helpers):
        return z.sum() * 0
    theirs, own = helpers.log_softmax(dim=2), z.log_softmax(dim=1)
    return (theirs.exp() * (theirs - own)).sum(dim=2).mean()


def fedmatch_loss(
    z: Tensor,
    z_strong: Tensor,
    helpers: Tensor,
    sigma: Tensor,
    psi: Tensor,
    *,
    confidence: float = 0.75,
    lam_i: float = 0.01,
    lam_a: float = 0.01,
    lam_1: float = 1e-4,
    lam_2: float = 10.0,
) -> Matched:
    """``lam_a CE(z_strong, y) + lam_i consistency + lam_2 |sigma - psi|^2 + lam_1 |psi|_1`` of logits (B, C) on samples
    as they are and in the strong view; the first two are means over the samples of which ``max p >= confidence``."""
    keep, _ = sure(z, confidence)
    label = votes(z, helpers)
    loss = lam_2 * (sigma - psi).square().sum() + lam_1 * psi.abs().sum()
    if keep.any():
        loss = loss + lam_a * F.cross_entropy(z_strong[keep], label[keep])
        loss = loss + lam_i * consistency(z[keep], helpers[:, keep])
    return Matched(loss, keep, label)


@dataclass(frozen=True, kw_only=True)
class FedMatchClient(SGDClient):
    """Each step: ``sigma`` along the gradient of ``lam_s`` times cross entropy on a labelled batch, then ``psi`` along
    that of ``fedmatch_loss`` on ``mu`` times as many unlabelled samples; the model is ``sigma + psi``.

    The message: ``w`` (d,) their sum, ``psi`` (d,), and for a client with helpers their psi ``helpers`` (H, d), each of
    which is put to the received sigma (``sparse``: psi, and each as ``helper/0``, ..., as ``sent_psi`` makes them).
    Sent: the moves of the sum and of psi, and where there are helpers at all the trained model's probabilities on one
    fixed noise input, ``embedding`` (C,). A value ``pace`` multiplies the learning rate.
    """

    grad_only = False

    confidence: float
    lam_s: float
    lam_i: float
    lam_a: float
    lam_1: float
    lam_2: float
    mu: int
    strong: str
    embeds: bool
    sparse: Sparse | None = None

    def fit(self, job: Job) -> Update:
        """Both parts in turn."""
        refuse_accumulation(job, "FedMatch")
        own, tally = unlabelled(job), Tally()
        if isinstance(pace := job.values.get("pace"), float):
            job.local = replace(job.local, lr=job.local.lr * pace)
            job.sgd = LocalSteps(job.local, job.round, job.layout, job.sgd.pace)
        w = job.start()
        received = received_psi("psi", job.message.arrays, w)
        assert received is not None
        run = _Parts(self, job, w, received)
        for batch, at in self._batches(job, own):
            if batch is not None:
                run.supervised(batch)
            if at is not None and own is not None:
                run.unsupervised(own, at, tally)
        if not job.steps:
            raise nothing(job)
        arrays = dict[str, Tensor]()
        if self.embeds:
            arrays["embedding"] = self._embedding(job, w, own or job.data)
        delta = job.delta(w)
        if self.sparse is None:
            arrays |= {"delta": delta, "psi": job.shared(run.psi - received)}
        else:
            psi = job.shared(self.sparse.moved(self.sparse.kept(run.psi), received))
            sigma = job.shared(self.sparse.moved(run.sigma, job.anchor - received))
            arrays |= {"delta": psi + sigma, "psi": psi}
        weight = float(len(job.data) + len(own or ())) if self.weighting == "samples" else 1.0
        return Update(
            arrays, weight=weight, metrics={**job.report(), **tally.metrics()}, guesses=tally.guesses
        )

    def _batches(self, job: Job, own: LocalData | None) -> Iterator[tuple[Batch | None, Tensor | None]]:
        """A labelled batch and positions of unlabelled samples for each step; ``None`` where the client has none, or
        with BatchNorm a single one."""
        size, steps = self.mu * job.local.batch_size, job.num_steps
        smallest = 2 if job.layout.batch_norm else 1
        if own is None or (steps and not batches_per_epoch(len(own), size, smallest)):
            yield from ((batch, None) for batch in job.batches())
        elif steps:
            yield from zip(
                job.batches(), extra_batches(job, own, size, steps, smallest=smallest), strict=False
            )
        else:
            job.local = replace(job.local, batch_size=size)
            yield from ((None, batch.y) for batch in job.batches(UNLABELLED, data=Positions.of(own)))

    def _embedding(self, job: Job, w: Tensor, data: LocalData) -> Tensor:
        """Probabilities (C,) of the trained model on noise of the samples' shape, the same for all clients."""
        x = data.read(torch.zeros(1, dtype=torch.long)).x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ClientError(
                "FedMatch compares clients on an input of noise, which tokens and trees have none of; type "
                "strategy.helpers=0"
            )
        noise = torch.randn(x.shape, generator=rng.torch_rng(job.seed, "fedmatch/noise"), dtype=torch.float64)
        return look(job, w, [noise.to(x)]).softmax(dim=1)[0]


def _helpers(arrays: Mapping[str, Tensor], like: Tensor) -> Iterator[Tensor]:
    """Each helper's psi (d,)."""
    yield from arrays.get("helpers", ())
    for i in count():
        one = received_psi(f"helper/{i}", arrays, like)
        if one is None:
            return
        yield one


class _Parts:
    """``sigma`` and ``psi`` (d,) of one job, and the resident vector ``w`` (d,) that is their sum."""

    def __init__(self, options: FedMatchClient, job: Job, w: Tensor, psi: Tensor):
        self.options, self.job, self.w = options, job, w
        self.psi, self.sigma = psi.clone(), job.anchor - psi
        self.descend = LocalSteps(job.local, job.round, job.layout, job.sgd.pace)
        self.helpers = [self.sigma + one for one in _helpers(job.message.arrays, w)]
        self.statistics = job.model.buffers.clone()

    def supervised(self, batch: Batch) -> None:
        """One step of sigma."""
        job, task = self.job, self.job.task
        g = job.grad(self.w, batch, loss=lambda output, y: self.options.lam_s * task.loss(output, y))
        self.sigma = job.sgd(self.sigma, g)
        torch.add(self.sigma, self.psi, out=self.w)

    def unsupervised(self, own: LocalData, at: Tensor, tally: Tally) -> None:
        """One step of psi; the regularisers act whether samples are kept or not."""
        options, job = self.options, self.job
        x = own.read(at).x
        z = look(job, self.w, [x])
        theirs = [look(job, one, [x], self.statistics) for one in self.helpers]
        helpers = torch.stack(theirs) if theirs else z.new_zeros(0, *z.shape)
        keep, _ = sure(z, options.confidence)
        label = votes(z, helpers)
        if (truth := true_labels(own)) is not None:
            keep, label = torch.ones_like(keep), truth[at].to(label.device)
        kept = keep.cpu()
        tally.add(len(at), at[kept], label[keep].cpu())
        g = torch.zeros_like(self.psi)
        if kept.any():
            g = self._gradient(own, at, kept, label[keep], helpers[:, keep])
        g.add_(self.sigma - self.psi, alpha=-2 * options.lam_2).add_(self.psi.sign(), alpha=options.lam_1)
        self.descend.idle = ()
        self.psi = self.descend(self.psi, g)
        torch.add(self.sigma, self.psi, out=self.w)

    def _gradient(self, own: LocalData, at: Tensor, kept: Tensor, label: Tensor, helpers: Tensor) -> Tensor:
        """Of agreement with the label in the strong view, and with the helpers; at the sum it is that of psi."""
        options, job = self.options, self.job
        whole = bool(job.layout.batch_norm)  # its statistics are those of the batch as it was drawn
        plain = Batch(own.read(at if whole else at[kept]).x)
        strong, n = job.view(options.strong, plain).x, plain.size

        def loss(output: Any, y: Any) -> Tensor:
            views = [part[kept] if whole else part for part in torch.split(as_logits(output), n)]
            total = options.lam_a * F.cross_entropy(views[0], label)
            return total + options.lam_i * consistency(views[1], helpers) if len(helpers) else total

        shown = joined(strong, plain.x) if len(helpers) else strong
        return job.grad(self.w, Batch(shown), loss=loss)
