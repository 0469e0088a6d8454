"""MOON. Li, He, Song: Model-Contrastive Federated Learning, CVPR 2021 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.moon import MoonClient
from fedsim.exchange.payload import Message
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Moon(FedAvg):
    """FedAvg with a contrastive term: representations near the global model's, far from the previous local one's.

    ``contrast``: it begins at each client's second ``turn``, or for everybody after ``round`` 0: a client that never
    trained is then held away from the run's initial model, which travels beside the present one.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, features=True)
    mu: float
    tau: float
    contrast: str = "turn"

    def make_client(self) -> Client:
        """Model-contrastive SGD."""
        check(self.mu >= 0, "mu", self.mu, "the weight of the contrast must not be negative")
        check(self.tau > 0, "tau", self.tau, "the temperature must be positive")
        check(self.contrast in ("turn", "round"), "contrast", self.contrast, "choose one of turn, round")
        return MoonClient(weighting=self.weighting, mu=self.mu, tau=self.tau)

    def init(self, server: Server) -> State:
        """With ``contrast=round`` also the initial model, ``first`` (d,) and its statistics."""
        state = super().init(server)
        if self.contrast == "round":
            state |= {"first": state["w"].clone(), "first/buffers": state["buffers"].clone()}
        return state

    def message(self, state: State, round: Round) -> Message:
        """The model; with ``contrast=round`` also the initial one, once there are previous models at all."""
        if self.contrast == "turn" or round.index == 0:
            return super().message(state, round)
        return Message.of({k: state[k] for k in ("w", "buffers", "first", "first/buffers") if len(state[k])})
