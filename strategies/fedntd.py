"""FedNTD. Lee, Jeong, Shin, Bae, Yun: Preservation of the Global Knowledge by Not-True Distillation in Federated
Learning, NeurIPS 2022 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.fedntd import FedNTDClient
from fedsim.server.traits import Traits
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedNTD(FedAvg):
    """FedAvg whose clients keep the received model's view of the classes that a sample does not have."""

    traits: ClassVar[Traits] = replace(FedAvg.traits, labels=True, logits=True)
    beta: float
    tau: float

    def make_client(self) -> Client:
        """SGD with not-true distillation."""
        check(self.beta >= 0, "beta", self.beta, "the weight of the distillation must not be negative")
        check(self.tau > 0, "tau", self.tau, "the temperature must be positive")
        return FedNTDClient(weighting=self.weighting, beta=self.beta, tau=self.tau)
