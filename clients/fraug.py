"""FRAug's local rule: embeddings of a shared generator, turned client-specific by a network that stays at home, train
the classifier's head. Chen, Frikha, Krompass, Gu, Tresp: FRAug: Tackling Federated Learning with Non-IID Features via
Representation Augmentation, ICCV 2023 (section 3; order of steps and schedules as in the authors' code).

Usable by themselves: the networks (``Generator``, ``RTNet``), the distances (``mmd_kernel``, ``mmd_moments``, ``l1``,
``l2``; ``DISTANCES`` has them by the authors' names), the losses (``entropy``, ``non_saturating``), the schedules
(``ratio``, ``synthetic_weight``, ``balanced_labels``) and the running class means (``update_prototypes``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clients.distances import DISTANCES, entropy, l1, l2, mmd_kernel, mmd_moments, non_saturating
from clients.fraug_options import (
    RATIOS,
    FRAugOptions,
    balanced_labels,
    ratio,
    synthetic_weight,
    update_prototypes,
)
from clients.generators import Generator, RTNet, drawn, evaluating, networks
from clients.norm import LocalNormClient
from fedsim.data.local import Batch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.local.rates import round_factor
from fedsim.models.split import features_and_output, features_of, head_of
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights

__all__ = [
    "DISTANCES",
    "RATIOS",
    "FRAugClient",
    "FRAugOptions",
    "Generator",
    "RTNet",
    "balanced_labels",
    "entropy",
    "l1",
    "l2",
    "mmd_kernel",
    "mmd_moments",
    "non_saturating",
    "ratio",
    "synthetic_weight",
    "update_prototypes",
]


@dataclass(frozen=True, kw_only=True)
class FRAugClient(LocalNormClient):
    """Three steps per mini-batch: classifier, generator, RTNet; each with SGD of its own, whose momentum is kept.

    Client state: ``rtnet`` and ``rtnet/buffers``, drawn anew on the first participation; ``prototypes`` (C, D) and
    ``seen`` (C,); momenta; what the sharing modes leave here. Batches of one sample are skipped: BatchNorm.
    """

    grad_only = False

    options: FRAugOptions

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a representation."""
        self.options.shapes(task.model)

    def fit(self, job: Job) -> Update:
        """The round's mini-batches, then what is shared goes up and the rest into the client's state."""
        if job.num_steps == 0:
            raise Refusal("no samples" if len(job.data) == 0 else "no local steps")
        if job.local.accumulate > 1:
            raise ClientError(
                "FRAug: its three networks step in turn with each batch; type client.accumulate=1"
            )
        w = job.start()
        run = self.local_update(job)
        job.sgd.momentum = run.kept("momentum") if job.local.momentum else None
        for batch in job.batches():
            if len(batch.y) > 1:
                run.step(w, batch)
            run.iteration += 1
        return run.finish(w, self.weighting)

    def local_update(self, job: Job) -> LocalUpdate:
        """The machinery of one job, loaded with what was received and kept."""
        return LocalUpdate(self.options, job)


class LocalUpdate:
    """One client's round: classifier ``job.model``, networks ``G`` and ``R``, and the running class means."""

    def __init__(self, options: FRAugOptions, job: Job):
        self.options, self.job = options, job
        self.model: Any = job.model.module
        self.D, self.L, self.C = options.shapes(self.model)
        w = job.model.w
        self.G, self.R = networks(self.D, self.L, self.C, options.rtnet_bn, w.dtype, str(w.device))
        self.part = options.generator_part(self.G.layout)
        received = job.message.arrays
        if options.use_generator:
            self.G.load(received["generator"], received.get("generator_buffers"))
            self.part.overlay(self.G, _below(job.state, "generator/"))
            self.start = self.G.w.clone()
        if options.use_rtnet:
            self.R.load(*self._own_rtnet())
        self.prototypes = job.state.get("prototypes", w.new_zeros(self.C, self.D))
        self.seen = job.state.get("seen", w.new_zeros(self.C))
        self.speed = {name: self.kept(f"{name}/momentum") for name in ("generator", "rtnet")}
        self.r, self.lam = options.ratio(job.round), options.weight(job.round)
        self.first_draw, self.iteration = job.round * job.num_steps, 0
        self.noise = job.rng("latent")
        self.losses: dict[str, list[Tensor]] = {}

    def kept(self, name: str) -> Tensor | None:
        """A momentum of the client's last round, unless each round starts at rest."""
        found = None if self.options.reset_momentum else self.job.state.get(name)
        return None if found is None else found.clone()

    def step(self, w: Tensor, batch: Batch) -> None:
        """The three steps on one mini-batch, in this order."""
        self.classifier_step(w, batch)
        train_generator, train_rtnet = self.options.use_generator, self.options.use_rtnet
        if not train_generator and not train_rtnet:
            return
        with evaluating(self.model):
            # the classifier no longer moves: one look at the real embeddings serves both steps
            apart = train_generator and self.options.dist_generator.startswith("MMD")
            u = self.job.forward(w, batch.x, features_of) if apart or train_rtnet else None
            if train_generator:
                self.generator_step(batch, u if apart else None)
            if train_rtnet and u is not None:
                with evaluating(self.G.module):
                    self.rtnet_step(batch, u)

    def classifier_step(self, w: Tensor, batch: Batch) -> None:
        """One step of all of theta on ``lam syn + (1 - lam) real``; the synthetic loss reaches the head only."""

        def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            u, logits = output
            self._see(u.detach(), y)
            real: Tensor = self.job.task.loss(logits, y)
            self._log("real", real)
            if not self.lam:
                return real
            synthetic = [self._synthetic(u.detach(), y, s) for s in range(self.options.draws)]
            syn = torch.stack(synthetic).mean()
            self._log("synthetic", syn)
            return self.lam * syn + (1 - self.lam) * real

        with evaluating(self.G.module), evaluating(self.R.module):
            self.job.descend(w, batch, loss=loss, forward=features_and_output)

    def generator_step(self, batch: Batch, u: Tensor | None) -> None:
        """One step of omega on ``CE(h(v), yb) - lam_G dist(v, a)``: classifiable, yet unlike this client's features.

        ``a`` are the real embeddings ``u`` for an MMD, which pairs no rows; else the class means of ``yb``.
        """
        y = self.labels(self.first_draw + self.iteration, len(batch.y))
        anchor = self.prototypes[y] if u is None else u

        def loss(v: Tensor, y: Tensor) -> Tensor:
            real: Tensor = self.job.task.loss(head_of(self.model)(v), y)
            apart = DISTANCES[self.options.dist_generator](v, anchor)
            self._log("generator", real)
            self._log("generator_distance", apart)
            return real - self.options.lam_generator * apart

        g, _ = self.G.grad(self.G.w, self.latent(len(y)), y, loss, forward=lambda net, z: net(z, y))
        self._descend("generator", self.G.w, g, self.options.lr_generator)

    def rtnet_step(self, batch: Batch, u: Tensor) -> None:
        """One step of phi: uncertain to the head, close to the anchors; two separate passes."""
        yb = self.labels(self.first_draw + self.iteration, len(batch.y))
        options = self.options
        with torch.no_grad():
            pairs = [
                (self.fake(self.latent(len(y)), y), anchor, y)
                for anchor, y in ((self.prototypes[yb], yb), (u, batch.y))
            ]

        def passes(net: nn.Module, _: Tensor) -> list[Tensor]:
            return [net(*pair) for pair in pairs]

        def loss(made: list[Tensor], _: Tensor) -> Tensor:
            doubt = [self._doubt(head_of(self.model)(a), y) for a, (_, _, y) in zip(made, pairs, strict=True)]
            far = [DISTANCES[options.dist_rtnet](a, b) for a, (_, b, _) in zip(made, pairs, strict=True)]
            self._log("rtnet", (doubt[0] + doubt[1]) / 2)
            self._log("rtnet_distance", (far[0] + far[1]) / 2)
            return (doubt[0] + doubt[1]) / 2 + options.lam_rtnet * (far[0] + far[1]) / 2

        g, _ = self.R.grad(self.R.w, u, batch.y, loss, forward=passes)
        self._descend("rtnet", self.R.w, g, options.lr_rtnet)

    def finish(self, w: Tensor, weighting: str) -> Update:
        """Shared parts as differences from what was received; own parts as state."""
        job, options = self.job, self.options
        arrays, state = {"delta": job.delta(w)}, {"prototypes": self.prototypes, "seen": self.seen}
        if options.use_rtnet:
            state |= {"rtnet": self.R.w, "rtnet/buffers": self.R.buffers}
        if options.use_generator:
            state |= {f"generator/{k}": v for k, v in self.part.keep(self.G, self.G.w).items()}
            arrays["generator"] = self.G.w - self.start
            for span in self.part.spans:
                arrays["generator"][span] = 0
            if not self.part.buffers:
                arrays["generator_buffers"] = self.G.buffers
        if not options.reset_momentum:
            speeds = {f"{k}/momentum": v for k, v in self.speed.items()} | {"momentum": job.sgd.momentum}
            state |= {k: v for k, v in speeds.items() if v is not None}
        for name, values in self.losses.items():
            job.metrics[f"loss_{name}"] = float(torch.stack(values).mean())
        job.metrics["unseen_classes"] = float((self.seen == 0).sum())
        return Update(arrays, weight=job.weight(weighting), state=state, metrics=job.report())

    def labels(self, draw: int, count: int) -> Tensor:
        """Balanced labels (count,); under ``unseen_classes: drop`` cyclic over the classes seen here."""
        device = self.prototypes.device
        if self.options.unseen_classes == "keep":
            return balanced_labels(draw, count, self.C).to(device)
        known = self.seen.nonzero().flatten()
        return known[balanced_labels(draw, count, len(known)).to(device)]

    def latent(self, count: int) -> Tensor:
        """Noise (count, L), or (count, D) where it stands in for the generator; the same numbers in every dtype."""
        size = (count, self.L if self.options.use_generator else self.D)
        z = (torch.randn if self.options.latent == "normal" else torch.rand)(size, generator=self.noise)
        return z.to(self.prototypes)

    def fake(self, z: Tensor, y: Tensor) -> Tensor:
        """``G(z, y)`` (B, D)."""
        made: Tensor = self.G.module(z, y) if self.options.use_generator else z
        return made

    def _synthetic(self, u: Tensor, y: Tensor, s: int) -> Tensor:
        """``1/2 [CE(h(u_c), yb) + CE(h(u_s), y)]`` of one draw; u_c, u_s carry no gradient."""
        draws = self.options.draws
        yb = self.labels(self.first_draw + self.iteration * draws + s, len(y))
        parts = []
        for anchor, labels in ((self.prototypes[yb], yb), (u.to(self.prototypes.dtype), y)):
            with torch.no_grad():
                made = self.fake(self.latent(len(labels)), labels)
                if self.options.use_rtnet:
                    made = self.R.module(made, anchor, labels)
                if self.options.interpolate:
                    made = self.r * made + (1 - self.r) * anchor
            parts.append(self.job.task.loss(head_of(self.model)(made), labels))
        return (parts[0] + parts[1]) / 2

    def _doubt(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.options.rtnet_loss == "entropy":
            return -entropy(logits)
        return non_saturating(logits, y) if self.options.rtnet_loss == "non_saturating" else logits.sum() * 0

    def _see(self, u: Tensor, y: Tensor) -> None:
        """Update the class means by the training-mode embeddings of a batch."""
        first = self.seen == 0 if self.options.proto_init == "first" else None
        u = u.to(self.prototypes.dtype)
        self.prototypes = update_prototypes(self.prototypes, u, y, self.options.proto_momentum, first)
        self.seen = self.seen.index_fill(0, y, 1.0)

    def _descend(self, name: str, w: Tensor, g: Tensor, lr: float) -> None:
        """SGD with heavy-ball momentum, in place: ``v <- momentum v + g``, ``w <- w - lr c_t v``, c_t the round's."""
        speed = self.speed[name]
        if self.options.momentum:
            g = g if speed is None else speed.mul_(self.options.momentum).add_(g)
            self.speed[name] = g
        w.add_(g, alpha=-lr * round_factor(self.job.local, self.job.round))

    def _own_rtnet(self) -> Weights:
        state = self.job.state
        if "rtnet" in state:
            return Weights(state["rtnet"], state["rtnet/buffers"])
        build = partial(RTNet, self.D, self.L, self.C, self.options.rtnet_bn)
        return drawn(
            build, self.job.rng("rtnet").initial_seed(), self.R.w.dtype, str(self.R.w.device)
        ).weights

    def _log(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value.detach())


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
