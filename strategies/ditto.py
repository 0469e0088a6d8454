"""Ditto. Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021
(Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.ditto import DittoClient
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Ditto(FedAvg):
    """FedAvg for the global model; each client keeps a personal one, pulled to it with weight ``lam``."""

    lam: float

    def make_client(self) -> Client:
        """Two models a client."""
        check(self.lam >= 0, "lam", self.lam, "the pull to the global model must not be negative")
        return DittoClient(weighting=self.weighting, lam=self.lam)
