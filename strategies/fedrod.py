"""FedROD. Chen, Chao: On Bridging Generic and Personalized Federated Learning for Image Classification, ICLR 2022
(Algorithm 1, linear personalised head)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.prior import FedRODClient
from strategies.heads import HeadStrategy


@dataclass(kw_only=True)
class FedROD(HeadStrategy):
    """A generic model trained by balanced softmax, and a private head that each client adds to it."""

    def make_client(self) -> Client:
        """Two losses."""
        return FedRODClient(weighting=self.weighting)
