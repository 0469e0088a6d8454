"""FedOpt: adaptive server optimisers. Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive
Federated Optimization, ICLR 2021 (Algorithm 2); server momentum: Hsu, Qi, Brown 2019 (FedAvgM, arXiv 1909.06335)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.fedavg import FedAvg

RULES = ("adam", "yogi", "adagrad", "momentum")


@dataclass(kw_only=True)
class FedOpt(FedAvg):
    """With ``D = mean(x_K - x)``, ``M = beta1 M + (1 - beta1) D``: ``x += server_lr M / (sqrt V + tau)``, M and V not
    corrected for their start.

    ``rule`` of V: ``adam`` ``beta2 V + (1 - beta2) D^2``; ``yogi`` ``V - (1 - beta2) D^2 sign(V - D^2)``; ``adagrad``
    ``V + D^2``; ``momentum``: no V, ``M = beta1 M + D`` and ``x += server_lr M``. ``v0`` is V at the start (the paper
    asks for at least ``tau^2``, the FedSpeed authors' simulator takes 0).
    """

    traits: ClassVar[Traits] = replace(
        FedAvg.traits,
        unread={
            "beta2": ("rule", ("adagrad", "momentum")),
            "tau": ("rule", ("momentum",)),
            "v0": ("rule", ("momentum",)),
        },
    )
    rule: str
    beta1: float
    beta2: float
    tau: float
    v0: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rule in RULES, "rule", self.rule, f"choose one of {', '.join(RULES)}")
        check(0 <= self.beta1 < 1, "beta1", self.beta1, "must lie in [0, 1)")
        check(0 <= self.beta2 < 1, "beta2", self.beta2, "must lie in [0, 1)")
        check(self.tau > 0, "tau", self.tau, "must be positive")
        check(self.v0 >= 0, "v0", self.v0, "must not be negative")

    def init(self, server: Server) -> State:
        """Adds the moments ``m`` and ``v`` (d,)."""
        state = super().init(server)
        state["m"], start = torch.zeros_like(state["w"]), state["w"].new_full((server.layout.size,), self.v0)
        return state if self.rule == "momentum" else state | {"v": server.layout.expand(start)}

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """One server optimiser step with the mean update as its negative gradient."""
        delta = self.aggregate(replies)
        if self.rule == "momentum":
            m = self.beta1 * state["m"] + delta
            return state | {"w": state["w"] + self.server_lr * m, "m": m}
        m = self.beta1 * state["m"] + (1 - self.beta1) * delta
        v = self._second(state["v"], delta * delta)
        return state | {"w": state["w"] + self.server_lr * m / (v.sqrt() + self.tau), "m": m, "v": v}

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        if self.rule == "adam":
            return self.beta2 * v + (1 - self.beta2) * square
        if self.rule == "yogi":
            return v - (1 - self.beta2) * square * torch.sign(v - square)
        return v + square
