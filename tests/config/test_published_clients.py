"""Published results stay reproducible: their experiments' local training is what it was when they were obtained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf
from problems import GOLDEN

from experiments.byzantine import COMMON, LOCAL

CLIENTS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "experiment_clients.json").read_text())


@pytest.mark.parametrize("name", CLIENTS)
def test_an_experiment_trains_as_it_did(name: str) -> None:
    now = OmegaConf.to_container(compose_quickly([f"experiment={name}"]).client, resolve=True)
    assert {k: now[k] for k in CLIENTS[name]} == CLIENTS[name]


def test_the_robust_rules_were_compared_under_weight_decay_and_clipping() -> None:
    """The page's local training; its gradients say that they have neither."""
    client = compose_quickly([o.format(lr=1) for o in (*COMMON, *LOCAL)]).client
    assert (client.lr, client.lr_decay, client.steps, client.batch_size) == (0.1, 1, 5, 32)
    assert (client.weight_decay, client.clip_norm, client.momentum) == (1e-3, 10, 0)
