"""FedProx. Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020
(Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.fedprox import FedProxClient
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """FedAvg with local steps along ``g + mu (x - x^t)``."""

    mu: float

    def make_client(self) -> Client:
        """Proximal SGD."""
        check(self.mu >= 0, "mu", self.mu, "the prox weight must not be negative")
        return FedProxClient(weighting=self.weighting, mu=self.mu)
