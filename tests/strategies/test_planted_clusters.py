"""Planted clusters of real digits, found again: four rotations, four label shifts, one population."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from problems import QUIET
from torch import Tensor, nn

import fedsim

COUNT, EACH, PLANTS = 20, 72, 4
IFCA = ("strategy=ifca", "rounds=40")
WAYS = {
    "ifca": IFCA,
    "ifca-restarts": (*IFCA, "strategy.start=random", "strategy.restarts=10"),
    "ifca-cohort": ("strategy=ifca", "rounds=80", "clients_per_round=8"),
    "fesem": ("strategy=fesem", "rounds=40"),
    "cfl": ("strategy=cfl", "rounds=60"),
    "cfl-four": ("strategy=cfl", "rounds=60", "strategy.max_clusters=4"),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(y)


def clients(plant: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """20 clients of 72 digits, of which 54 are trained on; the plant of client c is c % 4."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    out = []
    for c in range(COUNT):
        rows, kind = order[c * EACH : (c + 1) * EACH], c % PLANTS
        turned = torch.rot90(x[rows], kind if plant == "rotations" else 0, (1, 2))
        shift = 2 * kind if plant == "labels" else 0
        out.append((turned.reshape(len(rows), 64), (y[rows] + shift) % 10))
    return out


def run(plant: str, seed: int, *settings: str, **more: Any) -> fedsim.RunResult:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    local = ("client.epochs=2", "client.batch_size=10", "client.lr=0.1", "client.lr_decay=1", "engine=serial")
    measured = ("evaluation.holdout=0.25", "evaluation.clients_every=1000", "client.weight_decay=0")
    fixed = (*QUIET, *local, *measured, f"seed={seed}", f"clients_per_round={COUNT}", "client.clip_norm=null")
    domains = None if plant == "none" else [f"plant {c % PLANTS}" for c in range(COUNT)]
    return fedsim.simulate(
        [*fixed, *settings], model=model, clients=clients(plant, seed), domains=domains, **more
    )


@cache
def fedavg(plant: str, seed: int, rounds: int = 40) -> float:
    return float(run(plant, seed, "strategy=fedavg", f"rounds={rounds}").rows[-1]["clients/accuracy"])


def check(plant: str, way: str, seed: int) -> None:
    row = run(plant, seed, *WAYS[way]).rows[-1]
    assert row["ari"] == 1 and row["clusters"] == PLANTS
    gain = row["clients/accuracy"] - fedavg(plant, seed)
    assert gain > (0.06 if plant == "rotations" else 0.6)


@pytest.mark.slow
def test_fesem_finds_label_shifts() -> None:
    check("labels", "fesem", 0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plant", ["rotations", "labels"])
def test_planted_clusters_are_found(plant: str, way: str, seed: int) -> None:
    check(plant, way, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_cfl_leaves_one_population_whole(seed: int) -> None:
    assert run("none", seed, "strategy=cfl", "rounds=60").rows[-1]["clusters"] == 1


@pytest.mark.nightly
def test_ifca_loses_little_on_one_population() -> None:
    """On average: single seeds lose .6 to 4.7 points."""
    lost = [fedavg("none", s) - run("none", s, *IFCA).rows[-1]["clients/accuracy"] for s in range(5)]
    assert sum(lost) / len(lost) < 0.03
