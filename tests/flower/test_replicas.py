"""Copies of the model at nodes: they follow by the log; one that is lost is sent again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import Spoiler, deploy, node
from real import hashes
from safetensors.torch import load_file

import fedsim
from fedsim.flower import nodes as nodes_module
from fedsim.rng import hash_tensors

ONE_BYTE = ("strategy=one_byte", "strategy.lr=0.05", "model=linear", "rounds=5", "clients_per_round=3")
SIZE = 4 * 650


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def copies(folder: Path, client: int) -> list[str]:
    """Hashes of the copies that a node keeps, as rows of the log have them."""
    files = folder.glob(f"state-{client}/**/client-{client}/*.safetensors")
    found = [load_file(path) for path in files if "standing" not in path.name]
    return [hash_tensors([state["w"][:650]]) for state in found if "w" in state]  # behind it is padding


def test_a_node_that_lost_its_copy_says_so_and_is_sent_the_model(tmp_path: Path) -> None:
    def lose(message: Any) -> None:
        shutil.rmtree(tmp_path / "state-1")

    settings = (*ONE_BYTE, "engine.lost_state=restart", "strategy.samples=4")
    run, _ = deploy(tmp_path, *settings, spoil=Spoiler(lose, (3, 1)))
    assert [r.get("out_of_sync") for r in run.rows] == [None, None, [1], None, None]
    assert [r["bytes_up"] for r in run.rows] == [12] * 5
    assert [r["bytes_down"] for r in run.rows[:3]] == [0, 3 * 12, 3 * 12]
    assert run.rows[3]["bytes_down"] == SIZE + 2 * (8 + 1)
    before_last = hashes(tmp_path / "run")[-2]
    assert all(before_last in copies(tmp_path, c) for c in range(3))


def test_a_node_that_joins_late_replays_what_it_missed(tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(2)}

    def join(message: Any) -> None:
        nodes[102] = node(tmp_path, 2)

    settings = (*ONE_BYTE, "engine.wait_for=2", "engine.deadline=0.5", "strategy.hash_every=1")
    run, _ = deploy(tmp_path, *settings, nodes=nodes, spoil=Spoiler(join, (3, 0)))
    there = [[c for c in r["cohort"] if c not in {f["client"] for f in r["failures"]}] for r in run.rows]
    assert there[0] == [0, 1] and there[-1] == [0, 1, 2]
    assert not any("out_of_sync" in r for r in run.rows)
    assert hashes(tmp_path / "run")[-2] in copies(tmp_path, 2)
    absent = fedsim.simulate(
        ["num_clients=3", "engine=serial", "tracker=quiet", *ONE_BYTE, "strategy.hash_every=1"], cohorts=there
    )
    assert [r["weights_hash"] for r in absent.rows] == hashes(tmp_path / "run")
