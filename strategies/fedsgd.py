"""FedSGD: distributed SGD with momentum at the server. McMahan et al. 2017; as the flag aggregator's authors train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from clients.base import Client
from clients.gradient import GradientClient
from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedSGD(FedAvg):
    """With the clients' mini-batch gradients g_i at ``x``: ``m <- momentum m + mean(g_i) + weight_decay x``,
    ``x <- x - lr m``, where ``lr = server_lr lr_decay ** (round // decay_every)``."""

    traits: ClassVar[Traits] = replace(
        FedAvg.traits, one_step=True, unread={"decay_every": ("lr_decay", (1,))}
    )
    momentum: float
    weight_decay: float
    lr_decay: float
    decay_every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, "momentum", self.momentum, "must lie in [0, 1)")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        check(self.lr_decay > 0, "lr_decay", self.lr_decay, "must be positive")
        check(self.decay_every >= 1, "decay_every", self.decay_every, "rounds, at least 1")

    def make_client(self) -> Client:
        """A client that sends its gradient."""
        return GradientClient(weighting=self.weighting)

    def init(self, server: Server) -> State:
        """Adds the momentum ``m`` (d,) = 0."""
        state = super().init(server)
        return state | {"m": torch.zeros_like(state["w"])}

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """One step of SGD with momentum, as ``torch.optim.SGD`` does it."""
        gradient = self.weight_decay * state["w"] - self.aggregate(replies)
        m = self.momentum * state["m"] + gradient
        lr = self.server_lr * self.lr_decay ** (round.index // self.decay_every)
        return state | {"w": state["w"] - lr * m, "m": m}
