"""Lists, tuples and trees of arrays as samples of a deployment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node
from real import hashes
from test_local import simulated

from fedsim.flower import nodes as nodes_module

SETTINGS = ("rounds=2", "clients_per_round=2", "client.epochs=1", "client.batch_size=5", "data=own")
SETTINGS += ("data._target_=pairs.read", "data.path=ward0", "model=linear", "model._target_=pairs.Pairs")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)
    monkeypatch.setenv("FEDSIM_ALLOW", "pairs")


@pytest.mark.parametrize("kind", ["list", "tuple", "tree"])
def test_trees_of_arrays_are_dealt_out_and_owned(kind: str, tmp_path: Path) -> None:
    words = (*SETTINGS, f"+data.kind={kind}", f"+model.kind={kind}")
    deploy(tmp_path / "dealt", *words, clients=2)
    assert hashes(tmp_path / "dealt/run") == [r["weights_hash"] for r in simulated(*words, clients=2).rows]
    own = {10 + k: node(tmp_path, k, **{"own-data": True, "data-path": f"ward{k + 1}"}) for k in range(2)}
    run, _ = deploy(tmp_path / "own", *words, clients=2, nodes=own)
    assert [row["failures"] for row in run.rows] == [[], []] and run.rows[1]["loss"] < 1
