"""SiloBN. Andreux, Ogier du Terrail, Beguier, Tramel: Siloed Federated Learning for Multi-Centric Histopathology
Datasets, DCL workshop at MICCAI 2020."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedsim.server.traits import Traits
from strategies.fedbn import FedBN


@dataclass(kw_only=True)
class SiloBN(FedBN):
    """FedAvg in which BatchNorm's running statistics stay with their client; its scale and shift are shared.

    Models are personal: measure them on each client's own samples.
    """

    traits: ClassVar[Traits] = replace(FedBN.traits, buffers="local")
