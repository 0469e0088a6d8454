"""A small problem of six clients, handed over in Python, and the shortest way to train on a changed one."""

from __future__ import annotations

from typing import Any

import torch
from problems import QUIET, classes
from torch import nn

import fedsim

PLAIN = classes()
TEST = classes((11,), seed=1)[0]


def linear(outputs: int = 3, features: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(features, outputs)


def train(
    clients: Any, test: Any = TEST, model: Any = None, *overrides: str, **given: Any
) -> fedsim.RunResult:
    settings = ["engine=serial", *QUIET, "rounds=2", "clients_per_round=6", "client.lr=0.1", *overrides]
    return fedsim.simulate(settings, model=model or linear(), clients=clients, test=test, **given)
