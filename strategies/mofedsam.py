"""MoFedSAM. Qu, Li, Duan, Liu, Tang, Lu: Generalized Federated Learning via Sharpness Aware Minimization, ICML 2022
(Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.fedcm import FedCMClient
from strategies.base import check
from strategies.fedcm import FedCM


@dataclass(kw_only=True)
class MoFedSAM(FedCM):
    """FedCM whose local gradients are taken at ``x + rho g / |g|``."""

    rho: float

    def make_client(self) -> Client:
        """Client-level momentum over SAM gradients."""
        check(self.rho >= 0, "rho", self.rho, "the ascent radius must not be negative")
        check(0 < self.alpha <= 1, "alpha", self.alpha, "the weight of the own gradient must lie in (0, 1]")
        return FedCMClient(weighting=self.weighting, alpha=self.alpha, rho=self.rho)
