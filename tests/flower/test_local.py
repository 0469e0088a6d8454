"""The apps on a grid in this process: every message passes through Flower's wire format."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from localgrid import deploy
from registry import TABLE, Entry

import fedsim

SMALL = ("rounds=3", "clients_per_round=2", "model=linear", "client.epochs=1", "engine.chunks=2")


def simulated(*overrides: str, clients: int = 3) -> fedsim.RunResult:
    return fedsim.simulate([f"num_clients={clients}", "engine=serial", "tracker=quiet", *overrides])


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e.label)
def test_every_method_gives_the_bits_of_its_simulation(entry: Entry, tmp_path: Path) -> None:
    model = "model=mlp" if entry.needs_head else "model=linear"
    settings = (*(o for o in SMALL if not o.startswith("model=")), model, *entry.arguments)
    twin, _ = deploy(tmp_path, *settings)
    alone = simulated(*settings)
    assert [r["weights_hash"] for r in twin.rows] == [r["weights_hash"] for r in alone.rows]
    for key in ("accuracy", "loss", "bytes_up", "bytes_down", "cohort", "train_loss"):
        assert [r[key] for r in twin.rows] == [r[key] for r in alone.rows], key
