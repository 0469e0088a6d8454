"""Settings of nodes and of runs that a deployment cannot have: refused by name, before round 1."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import LocalGrid, deploy, node

from fedsim.errors import ConfigError, EngineError
from fedsim.flower import nodes as nodes_module
from fedsim.flower import server
from fedsim.flower.options import configuration

SPEED = ("strategy=fedspeed", "rounds=4", "clients_per_round=3", "model=linear", "client.epochs=1")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"partition-id": 7}, "partition-id=7: the run has 3 clients, so it must be an integer from 0 to 2"),
        ({"partition_id": 2}, "the node has no partition-id; nearest is 'partition-id'"),
        ({"partition-id": 2, "num-partitions": 5}, "num-partitions=5: the run has num_clients=3"),
        (
            {"partition-id": 2, "own_data": True},
            "unknown key 'own_data' in the node's settings; nearest is 'own-data'",
        ),
        (
            {"partition-id": 2, "colour": "red"},
            "unknown key 'colour' in the node's settings; they are partition-id, ",
        ),
        ({"partition-id": 2, "state-dir": ""}, "state-dir='': must be a path in quotes"),
        ({"partition-id": 2, "own-data": "true"}, "own-data='true': must be true or false, without quotes"),
        ({"partition-id": "2"}, "partition-id='2': the run has 3 clients, so it must be an integer"),
        (
            {"partition-id": 2, "data-path": "/nowhere"},
            "data-path=/nowhere: fedsim.data.sources.digits reads no path",
        ),
    ],
)
def test_a_wrong_node_is_refused_by_name(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(2)} | {102: config}
    with pytest.raises(EngineError) as error:
        deploy(tmp_path, *SPEED, nodes=nodes)
    assert "missing: 2\nnode 102 is refused: ConfigError: " + reason in str(error.value)


def test_settings_of_other_apps_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c, **{"viewer.colour": "red"}) for c in range(2)}
    deploy(tmp_path, *SPEED[:2], "clients_per_round=2", *SPEED[3:], clients=2, nodes=nodes)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine=ray", "engine=ray: clients of a deployment are computed at their nodes"),
        ("+engine=ray", "engine=ray: clients of a deployment are computed at their nodes"),
        ("engine.wait_for=200", "engine.wait_for=200: the run has 20 clients; 0 waits for all"),
        ("checkpoint.every=5", "checkpoint.every=5: a deployment saves every round"),
        ("strategy=fedsped", "fedspeed"),
        ("system=phones", "system: a deployment has real devices"),
        ("name='a b", "No closing quotation"),
        ("engine.lost_state=shrug", "engine.lost_state=shrug: must be one of restart, stop"),
    ],
)
def test_settings_that_a_deployment_cannot_have_are_named(
    override: str, reason: str, monkeypatch: Any
) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError) as error:
        configuration({"overrides": override})
    assert reason in str(error.value)


def test_a_setting_typed_twice_ends_the_run_of_flwr() -> None:
    grid = LocalGrid({})
    for text, said in (
        ("rounds=2 strategy=fedprox rounds=3", "rounds=2 and rounds=3: one setting typed twice"),
        ("+data.size=3 data.size=4", "data.size=3 and data.size=4"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            server.app(grid, Context(1, 1, {}, RecordDict(), {"overrides": text}))
