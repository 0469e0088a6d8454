"""A tiny open world: four classes, two of which have labels."""

from __future__ import annotations

from typing import Any

from problems import Problem, classes, hashes, network

OPEN = "data.labelled={at: client, share: 0.5, per_class: false, classes: [0, 1]}"
FEW = (
    "strategy.centroids=3",
    "strategy.memory=20",
    "strategy.server_steps=4",
    "strategy.cal_start=1",
    "strategy.min_count=1",
)


def problem(clients: Any = None, **changes: Any) -> Problem:
    """Four classes, two of which have labels."""
    settings = ("rounds=3", "clients_per_round=3", "client.epochs=2", "client.batch_size=8", "dtype=float64")
    parts: dict[str, Any] = {
        "model": network("tanh", 4, 4),
        "clients": classes((20, 24, 16), num_classes=4) if clients is None else clients,
        "settings": settings,
        "test": classes((40,), num_classes=4, seed=1)[0],
    }
    return Problem(**{**parts, **changes})


def run(*settings: str, strategy: str = "fedossl", **changes: Any) -> list[str]:
    return hashes(problem(**changes).run(f"strategy={strategy}", *FEW, OPEN, *settings))
