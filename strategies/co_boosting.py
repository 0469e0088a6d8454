"""Co-Boosting. Dai, Zhang, Li, Liu, Tian, Han: Enhancing One-Shot Federated Learning Through Data and Ensemble
Co-Boosting, ICLR 2024 (arXiv 2402.15070). With switches, DENSE: Zhang, Chen, Li, Lyu, Wu, Ding, Shen, Wu: DENSE:
Data-Free One-Shot Federated Learning, NeurIPS 2022."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchange.payload import Message, Payload
from fedsim.rng import torch_rng
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.vectors import Weights
from strategies.base import State, check, miscounted
from strategies.distilling import Momentum, passes, trained
from strategies.ensembles import (
    adversarial_loss,
    cosine,
    disagreement_loss,
    ensemble,
    entropy,
    hard_loss,
    kl,
    usable,
    weight_gradient,
    weight_step,
)
from strategies.one_shot import OneShot, check_images, fedavg
from strategies.synthesis import KINDS, Statistics, batch_norms, check_stds, generator, layers_of, synthesised
from strategies.teaching import Lesson, outputs, taught, teachers

log = logging.getLogger(__name__)

BYTE = 255  # of a pool that is kept in bytes
MANY = 4096  # of a batch times models: above, their graph is computed twice in place of held
STARTS, LABELS = ("fresh", "initial", "fedavg"), ("uniform", "present")


@dataclass(kw_only=True)
class CoBoosting(OneShot):
    """Samples that are hard for the ensemble and weights that make it better, in turn; a student learns from both.

    A round is one epoch e: samples are made (``L = b_H L_H + b_A L_A + b_B L_BN``), the ensemble's weights take one
    pass over those of before, and the student one over all. Options as in ``conf/strategy/co_boosting.yaml``.
    """

    traits: ClassVar[Traits] = replace(OneShot.traits, horizon=True)
    epochs: int
    batch_size: int
    samples: int
    generator: str
    width: int
    noise: int
    init_std: Any
    generator_steps: int
    generator_lr: float
    generator_clip: float | None
    labels: str
    loss: str
    views: bool
    h: float
    b_H: float  # noqa: N815 - the spec's symbols
    b_A: float  # noqa: N815
    b_B: float | None  # noqa: N815
    T_A: float
    weights: bool
    mu: float | None
    mu_decay: float
    perturb: str
    eps: float
    T_K: float
    start: str
    lr: float
    momentum: float
    weight_decay: float
    clip: float | None
    pool_bits: int

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("samples", 2), ("width", 1), ("noise", 1)):
            check((value := getattr(self, name)) >= least, name, value, f"must be at least {least}")
        check(self.generator_steps >= 1, "generator_steps", self.generator_steps, "must be at least 1")
        stds = check_stds(self.init_std)
        check(stds, "init_std", self.init_std, "must be a number that is not negative, or a list of such")
        check(self.momentum < 1, "momentum", self.momentum, "must lie in [0, 1)")
        for name in ("generator_lr", "T_A", "T_K", "lr"):
            check((value := getattr(self, name)) > 0, name, value, "must be positive")
        for name in ("h", "b_H", "b_A", "eps", "momentum", "weight_decay"):
            check((value := getattr(self, name)) >= 0, name, value, "must not be negative")
        for name in ("mu", "b_B"):
            check((value := getattr(self, name)) is None or value >= 0, name, value, "must not be negative")
        for name in ("clip", "generator_clip"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be positive, or null")
        check(0 < self.mu_decay <= 1, "mu_decay", self.mu_decay, "must lie in (0, 1]")
        for name, known in (
            ("generator", KINDS),
            ("labels", LABELS),
            ("loss", ("hard", "dense")),
            ("perturb", ("sign", "l2", "none")),
            ("start", STARTS),
            ("pool_bits", (8, 32)),
        ):
            listed = ", ".join(map(str, known))
            check((value := getattr(self, name)) in known, name, value, f"choose one of {listed}")
        super().__post_init__()

    @property
    def averages(self) -> bool:
        """Only for ``start=fedavg``."""
        return self.start == "fedavg"

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Counts that are none, or of more samples than there are."""
        return miscounted("counts", asked, update)

    def init(self, server: Server) -> State:
        """Refuses to begin with data of which no samples can be made, or statistics that no model has."""
        kind, layers = layers_of(self.generator, check_images(server, type(self).__name__))
        if isinstance(self.init_std, Sequence) and len(self.init_std) != layers:
            raise ConfigError(
                f"strategy.init_std={list(self.init_std)}: the generator '{kind}' has {layers} layers; give one "
                "number for all, or one each"
            )
        if self.b_B and not any(batch_norms(server.architecture(n).task.model) for n in server.trained):
            raise ConfigError(
                f"strategy.b_B={self.b_B:g}: no model of the clients has BatchNorm, whose statistics samples could "
                "meet; type strategy.b_B=0"
            )
        shop, x = server.workshop, server.task.example.cpu().double()
        low, high = (shop.shown(torch.full((1, *shop.shape), v).to(shop.device)).cpu() for v in (-0.01, 1.01))
        if bool((x < low).any() or (x > high).any()):
            log.warning(
                "samples are made in [0, 1], normalised as the data are, and do not reach where the clients' lie (the "
                "first have %.3g to %.3g); take data in [0, 1] (docs/one_shot.md)",
                *(float(x.min()), float(x.max())),
            )
        return super().init(server)

    def begun(self, server: Server, state: State, uploads: Uploads) -> State:
        """A student, at rest, equal weights ``ensemble/w`` (K,), an empty pool."""
        shape = server.workshop.shape
        w = Weights(state["w"], state["buffers"])
        if self.start == "fedavg":
            w = fedavg(state, uploads)
        elif self.start == "fresh" and server.fresh is not None:
            w = server.fresh(0)
        kind = torch.uint8 if self.pool_bits == 8 else server.dtype
        state = state | w._asdict()
        if self.labels == "present":
            clients = [m.client for m in uploads.models]
            with server.apart("class_counts"):
                replies = server.exchange(Message(), {"counts": "sum"}, task="counts", clients=clients)
            if len(replies):
                state["present"] = (replies.total("counts") > 0).double()
        return state | {
            "momentum": torch.zeros_like(w.w),
            "ensemble/w": torch.full((len(uploads),), 1 / len(uploads), dtype=torch.float64),
            "pool/x": torch.zeros((0, *shape), dtype=kind),
            "pool/y": torch.zeros(0, dtype=torch.int64),
        }

    def epoch(self, server: Server, state: State, uploads: Uploads, e: int) -> State:
        """Make samples, weigh the models, teach the student."""
        work = _Epoch(self, server, uploads, e)
        with server.workshop.at_work("co_boosting", e):
            w: Tensor = state["ensemble/w"]
            x, y = work.made(state, w)
            if self.weights and e > 0 and len(uploads) > 1:
                w = work.weighed(state["pool/x"], state["pool/y"], w)
            if x.dim() == 4 and x.shape[1] in (1, 3):
                server.workshop.pictures["synthetic"] = x, y
            pool = torch.cat([state["pool/x"], work.stored(x)]), torch.cat([state["pool/y"], y.cpu()])
            taught = work.taught(state, *pool, w)
        server.log["ensemble_weights"] = w.tolist()
        server.log["ensemble_weight"] = {
            str(m.client): v for m, v in zip(uploads.models, w.tolist(), strict=True)
        }
        server.log["ensemble/entropy"] = entropy(w)
        return state | taught | {"ensemble/w": w, "pool/x": pool[0], "pool/y": pool[1]}

    def combined(self, f: Tensor, state: State) -> dict[str, Tensor]:
        """``A_w``."""
        return {"ensemble": ensemble(f, state["ensemble/w"])} if "ensemble/w" in state else {}


class _Epoch:
    """One epoch of ``rule``: what its three steps share."""

    def __init__(self, rule: CoBoosting, server: Server, uploads: Uploads, e: int) -> None:
        self.rule, self.server, self.shop, self.e = rule, server, server.workshop, e
        self.models = teachers(server, uploads)

    def rng(self, purpose: str) -> torch.Generator:
        return torch_rng(self.server.seed, f"server/co_boosting/{purpose}", self.e)

    def made(self, state: State, w: Tensor) -> tuple[Tensor, Tensor]:
        """Step 1: samples (B, ...) in [0, 1] for labels y (B,), both fixed for this epoch."""
        rule, shop = self.rule, self.shop
        rng = self.rng("noise")
        z = torch.randn(rule.samples, rule.noise, generator=rng, dtype=torch.float64).to(shop.dtype)
        known = state["present"].nonzero()[:, 0] if "present" in state else torch.arange(shop.num_classes)
        y = known[torch.randint(len(known), (rule.samples,), generator=rng)].to(shop.device)
        drawn = self.rng("generator")
        net = generator(rule.generator, rule.noise, shop.shape, rule.width, rule.init_std, drawn)
        student = shop.frozen(Weights(state["w"], state["buffers"]))
        statistics = Statistics(self.models.modules(shop))
        b_B = rule.b_B if rule.b_B is not None else float(statistics.everywhere)
        views = self.rng("views") if rule.views else None
        many = rule.samples * len(w) > MANY

        def criterion(u: Tensor) -> Tensor:
            x = shop.shown(u, views)
            with statistics.watching() if b_B else nullcontext():
                a = ensemble(self.models.logits(shop, x, spare=many and not b_B), w)
            value = rule.b_H * (hard_loss(a, y, rule.h) if rule.loss == "hard" else F.cross_entropy(a, y))
            if rule.b_A:
                s = shop.logits(student, x)
                apart = adversarial_loss(a, s, rule.T_A) if rule.loss == "hard" else disagreement_loss(a, s)
                value = value + rule.b_A * apart
            return value + b_B * statistics.loss() if b_B else value

        net = net.to(shop.device, shop.dtype)
        bound, steps = rule.generator_clip, rule.generator_steps
        x, low = synthesised(net, z.to(shop.device), criterion, steps, rule.generator_lr, bound)
        self.server.log["synthesis_loss"] = low
        return x, y

    def weighed(self, pool: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """Step 2: the weights (K,) after one pass over the pool."""
        rule, start, rng = self.rule, w, self.rng("weights/views")
        mu = (0.1 / len(w) if rule.mu is None else rule.mu) * rule.mu_decay**self.e
        order = list(passes(len(y), rule.batch_size, self.rng("weights")))
        seen = (self.shop.shown(self.read(pool[rows]), rng) for rows in order)
        for rows, f in zip(order, outputs(self.server, self.models, seen, self.e), strict=True):
            g = weight_gradient(f.double(), w.to(f.device), y[rows].to(f.device)).cpu()
            w, lost = usable(weight_step(w, g, mu, start))
            if lost:
                log.warning("epoch %d: all ensemble weights were 0, and are 1/%d again", self.e + 1, len(w))
        return w

    def taught(self, state: State, pool: Tensor, y: Tensor, w: Tensor) -> State:
        """Step 4: the student after one pass over the pool."""
        rule, student = self.rule, self.shop.student
        student.load(state["w"].to(self.shop.device), state["buffers"].to(self.shop.device))
        v = state["momentum"].clone().to(self.shop.device)
        rate = cosine(rule.lr, self.e, rule.epochs)
        step = Momentum(v, rate, rule.momentum, rule.weight_decay, rule.clip)
        batches = taught(self.server, self.models, self.lessons(pool, y, w), self.e)
        loss = trained(student, batches, lambda s, t: kl(t, s, rule.T_K), step, self.shop.logits)
        if not math.isnan(loss):
            self.server.log["server/train_loss"] = loss
        found = {
            "w": student.w.clone().cpu(),
            "buffers": student.buffers.clone().cpu(),
            "momentum": v.cpu(),
        }
        student.forget()
        return found

    def lessons(self, pool: Tensor, y: Tensor, w: Tensor) -> Iterator[Lesson]:
        """Batches of the pool, and along what they are moved."""
        rule, draws, views = self.rule, self.rng("perturb"), self.rng("distil/views")
        moved = rule.perturb != "none" and rule.eps > 0
        for rows in passes(len(y), rule.batch_size, self.rng("distil")):
            x = self.shop.shown(self.read(pool[rows]), views)
            shape = len(x), self.shop.outputs
            u = torch.rand(shape, generator=draws, dtype=torch.float64) if moved else None
            yield Lesson(x, w, u, rule.eps, rule.perturb, rule.T_K)

    def stored(self, x: Tensor) -> Tensor:
        """Samples as the pool keeps them."""
        x = x.cpu()
        return (x * BYTE).round().to(torch.uint8) if self.rule.pool_bits == 8 else x

    def read(self, x: Tensor) -> Tensor:
        """Samples of the pool, in [0, 1] on the device."""
        x = x.to(self.shop.device)
        return x.to(self.shop.dtype) / BYTE if x.dtype == torch.uint8 else x
