"""MOON. Li, He, Song: Model-Contrastive Federated Learning, CVPR 2021 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.moon import MoonClient
from fedsim.server.traits import Traits
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Moon(FedAvg):
    """FedAvg with a contrastive term: representations near the global model's, far from the previous local one's."""

    traits: ClassVar[Traits] = replace(FedAvg.traits, features=True)
    mu: float
    tau: float

    def make_client(self) -> Client:
        """Model-contrastive SGD."""
        check(self.mu >= 0, "mu", self.mu, "the weight of the contrast must not be negative")
        check(self.tau > 0, "tau", self.tau, "the temperature must be positive")
        return MoonClient(weighting=self.weighting, mu=self.mu, tau=self.tau)
