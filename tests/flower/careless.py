"""A method whose clients write into the broadcast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clients.sgd import SGDClient
from strategies.fedavg import FedAvg


class CarelessClient(SGDClient):
    """Forgets to clone."""

    def fit(self, job: Any) -> Any:
        job.message.arrays["w"].add_(1)
        return super().fit(job)


@dataclass(kw_only=True)
class Careless(FedAvg):
    """FedAvg with careless clients."""

    def make_client(self) -> CarelessClient:
        return CarelessClient(weighting=self.weighting)


class BrokenClient(SGDClient):
    """Says in its error what should stay where it is."""

    def fit(self, job: Any) -> Any:
        raise ValueError("patient 7")


@dataclass(kw_only=True)
class Broken(FedAvg):
    """FedAvg with clients that fail."""

    def make_client(self) -> BrokenClient:
        return BrokenClient(weighting=self.weighting)


def own_data(path: str) -> Any:
    """A hospital's reader, which says in its error what should stay where it is."""
    raise KeyError(f"patient Smith in {path}")
