"""FedZO. Fang, Yu, Jiang, Shi, Jones, Zhou: Communication-Efficient Stochastic Zeroth-Order Optimization for Federated
Learning, arXiv 2201.09531, 2022."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.fedzo import FedZOClient
from clients.slopes import MEASURES
from fedsim.server.traits import Traits
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedZO(FedAvg):
    """FedAvg whose local gradients are estimated along b = ``directions`` random directions by differences over ``mu``:
    the memory of a forward pass, the bytes of a model."""

    traits: ClassVar[Traits] = replace(
        FedAvg.traits, buffers="average", metrics=frozenset({"nonfinite_slopes"})
    )
    directions: int
    mu: float
    measure: str

    def make_client(self) -> Client:
        """Local SGD on estimated gradients."""
        check(self.directions >= 1, "directions", self.directions, "must be at least 1")
        check(self.mu > 0, "mu", self.mu, "must be positive")
        check(self.measure in MEASURES, "measure", self.measure, f"choose one of {', '.join(MEASURES)}")
        return FedZOClient(
            weighting=self.weighting, directions=self.directions, mu=self.mu, measure=self.measure
        )
