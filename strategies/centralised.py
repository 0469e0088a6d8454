"""Centralised training: all clients' data in one place, the ceiling that federated methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedsim.server.traits import Traits
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Centralised(FedAvg):
    """SGD over the union of all clients' samples; a round is the configured number of epochs or steps over them."""

    traits: ClassVar[Traits] = replace(
        FedAvg.traits,
        pooled=True,
        mean_only="all samples lie in one place, so there is one update; leave it out",
    )
