"""FedBN. Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR
2021 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.norm import LocalNormClient
from fedsim.server.traits import Traits
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedBN(FedAvg):
    """FedAvg in which BatchNorm layers, weights and statistics, stay with their client.

    Models are personal: measure them with ``evaluation.holdout`` and ``evaluation.clients_every``. The global model's
    own statistics are never trained.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, personal=True, buffers="all_local", batch_norm=True)

    def make_client(self) -> Client:
        """SGD; a client that never took part takes statistics from its own samples."""
        return LocalNormClient(weighting=self.weighting)
