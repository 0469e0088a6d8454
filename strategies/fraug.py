"""FRAug. Chen, Frikha, Krompass, Gu, Tresp: FRAug: Tackling Federated Learning with Non-IID Features via
Representation Augmentation, ICCV 2023 (arXiv 2205.14900)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

from clients.base import Client
from clients.fraug import DISTANCES, RATIOS, FRAugClient, FRAugOptions
from clients.generators import Generator, drawn
from fedsim import rng
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.fedavg import FedAvg

SHARING: Mapping[str, str] = {"fedbn": "all_local", "silobn": "local", "all": "average"}  # of BatchNorm


@dataclass(kw_only=True)
class FRAug(FRAugOptions, FedAvg):
    """Averages the classifiers and the generators, weighted by samples; RTNets and class means never travel.

    ``share_model`` says what of the classifier stays with its client, by type of module: ``fedbn`` all of BatchNorm,
    ``silobn`` its running statistics, ``all`` nothing. ``share_generator``: ``all``, or ``no_bn`` without BatchNorm.
    Models are personal: measure them on each client's own samples. With ``lam: 0`` the classifier is FedBN's.
    """

    traits: ClassVar[Traits] = replace(
        FedAvg.traits, features=True, linear_head=True, labels=True, buffers="all_local", horizon=True
    )
    statistics: ClassVar[frozenset[str]] = frozenset({"generator_buffers"})
    share_model: str

    def __post_init__(self) -> None:
        self._check_choices()
        for key in ("rounds", "draws", "latent_dim"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, value, "must be at least 1")
        for key in ("gamma", "lam_generator", "lam_rtnet", "warmup_rounds"):
            value = getattr(self, key)
            check(value is None or value >= 0, key, value, "must not be negative")
        for key in ("lr_generator", "lr_rtnet"):
            check(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "must be in [0, 1)")
        check(0 < self.proto_momentum <= 1, "proto_momentum", self.proto_momentum, "must be in (0, 1]")
        check(self.lam is None or 0 <= self.lam <= 0.5, "lam", self.lam, "must be in [0, 0.5], or null")
        super().__post_init__()
        self.traits = replace(self.traits, buffers=SHARING[self.share_model])  # type: ignore[misc]

    def make_client(self) -> Client:
        """The three-step local update."""
        options = FRAugOptions(**{f.name: getattr(self, f.name) for f in fields(FRAugOptions)})
        return FRAugClient(weighting=self.weighting, options=options)

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Weighted means."""
        if not self.use_generator:
            return {"delta": "mean"}
        kinds = {"delta": "mean", "generator": "mean"}
        return kinds | ({"generator_buffers": "mean"} if self.share_generator == "all" else {})

    def init(self, server: Server) -> State:
        """Adds the ``generator`` (g,) and its statistics: one random start for everybody."""
        state = super().init(server)
        if self.use_generator:
            build = partial(Generator, *self.shapes(server.task.model))
            net = drawn(build, rng.key(server.seed, "server/generator") >> 1, server.dtype)
            state |= {"generator": net.w, "generator_buffers": net.buffers}
        return state

    def message(self, state: State, round: Round) -> Message:
        """The classifier and the generator."""
        names = (
            "w",
            "buffers",
            "generator",
            *(["generator_buffers"] if self.share_generator == "all" else []),
        )
        return Message.of({k: state[k] for k in names if k in state and len(state[k])})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move both along their mean updates; the generator's statistics are averaged."""
        state = super().update(state, replies, round)
        if self.use_generator:
            moved = self.aggregate(replies, "generator")
            state = state | {"generator": state["generator"] + self.server_lr * moved}
            if self.share_generator == "all":
                state = state | {"generator_buffers": replies.mean("generator_buffers")}
        return state

    def _check_choices(self) -> None:
        choices = {
            "schedule": RATIOS,
            "latent": ("normal", "uniform"),
            "dist_generator": tuple(DISTANCES),
            "dist_rtnet": tuple(DISTANCES),
            "rtnet_loss": ("entropy", "non_saturating", "none"),
            "proto_init": ("zero", "first"),
            "unseen_classes": ("keep", "drop"),
            "share_generator": ("all", "no_bn"),
            "share_model": tuple(SHARING),
        }
        for key, allowed in choices.items():
            check(
                getattr(self, key) in allowed, key, getattr(self, key), f"choose one of {', '.join(allowed)}"
            )
