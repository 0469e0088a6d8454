"""FedAvg with FixMatch (Sohn et al. 2020) or UDA (Xie et al. 2020) at the clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clients.base import Client
from clients.fixmatch import FixMatchClient, UDAClient
from strategies.base import check
from strategies.semisupervised import ServerTrains


@dataclass(kw_only=True)
class FixMatch(ServerTrains):
    """FedAvg of clients that train strong views on what the model is sure of in weak ones.

    Clients weigh all their samples, or the same. Where the server has the labels, clients train on unlabelled samples
    alone, and the server on its own after them.
    """

    tau: float
    lam: float
    mu: int
    labeller: str = "local"
    weak: str | None = "weak"
    strong: str = "strong"

    def make_client(self) -> Client:
        """Joint steps."""
        return FixMatchClient(**self._options())

    def _options(self) -> dict[str, Any]:
        check(self.tau >= 0, "tau", self.tau, "must not be negative; above 1 nothing is kept")
        check(self.lam >= 0, "lam", self.lam, "the weight of unlabelled samples must not be negative")
        check(self.mu >= 1, "mu", self.mu, "unlabelled samples for each labelled one: at least 1")
        known = ("local", "global")
        check(self.labeller in known, "labeller", self.labeller, f"choose one of {', '.join(known)}")
        names = ("weighting", "tau", "lam", "mu", "labeller", "weak", "strong")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class UDA(FixMatch):
    """The same with sharpened probabilities in the place of labels."""

    temperature: float

    def make_client(self) -> Client:
        """Joint steps."""
        check(self.temperature > 0, "temperature", self.temperature, "must be positive")
        return UDAClient(**self._options(), temperature=self.temperature)
