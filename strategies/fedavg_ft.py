"""FedAvg with local fine-tuning, the simplest personalisation. Wang, Mathews, Kiddon, Eichner, Beaufays, Ramage:
Federated Evaluation of On-device Personalization, 2019."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Client
from clients.finetune import FineTuneClient
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedAvgFT(FedAvg):
    """FedAvg; personal models are the global one after ``finetune_epochs`` on the client's samples."""

    finetune_epochs: int

    def make_client(self) -> Client:
        """SGD, and more of it before measuring."""
        check(self.finetune_epochs >= 1, "finetune_epochs", self.finetune_epochs, "give at least 1")
        return FineTuneClient(weighting=self.weighting, finetune_epochs=self.finetune_epochs)
