"""Short runs on a hundred and twenty points of three classes, dealt out to six clients."""

from __future__ import annotations

from typing import Any

from problems import network

import fedsim

BLOBS = (
    "data=blobs",
    "data.num_samples=120",
    "data.num_test=20",
    "data.num_features=4",
    "data.num_classes=3",
    "partition=iid",
)
SHORT = ("rounds=2", "clients_per_round=3", "client.epochs=1", "client.batch_size=4", "evaluation.every=1")


def run(*settings: str, **given: Any) -> Any:
    """Two rounds of FedAvg, unless ``settings`` say otherwise."""
    own = ["engine=serial", "tracker=quiet", "checkpoint.every=0", "num_clients=6", *BLOBS, *SHORT]
    return fedsim.simulate([*own, *settings], **{"model": network(), **given})
