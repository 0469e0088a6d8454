"""FedSAM. Qu, Li, Duan, Liu, Tang, Lu: Generalized Federated Learning via Sharpness Aware Minimization, ICML 2022
(Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.sam import SAMClient
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedSAM(FedAvg):
    """FedAvg with local gradients taken at ``x + rho g / |g|``."""

    rho: float

    def make_client(self) -> Client:
        """Local SAM."""
        check(self.rho >= 0, "rho", self.rho, "the ascent radius must not be negative")
        return SAMClient(weighting=self.weighting, rho=self.rho)
