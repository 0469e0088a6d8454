"""FedPer and FedRep: a shared body, a private head. Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with
Personalization Layers, 2019; Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized
Federated Learning, ICML 2021 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.fedrep import FedPerClient, FedRepClient
from fedsim.server.traits import Traits
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedPer(FedAvg):
    """FedAvg of the body; heads are trained with it and never sent. The global model's own head stays untrained."""

    traits: ClassVar[Traits] = replace(
        FedAvg.traits, personal=True, features=True, linear_head=True, body=True
    )

    def make_client(self) -> Client:
        """Joint training."""
        return FedPerClient(weighting=self.weighting)


@dataclass(kw_only=True)
class FedRep(FedPer):
    """As FedPer, with ``head_epochs`` on the head first, then the body against it."""

    head_epochs: int

    def make_client(self) -> Client:
        """Training in two phases."""
        check(self.head_epochs >= 1, "head_epochs", self.head_epochs, "give at least 1")
        return FedRepClient(weighting=self.weighting, head_epochs=self.head_epochs)
