"""Nodes that die, return, join late, forget or are wrong; servers that restart. On a grid in this process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import GONE, LocalGrid, Spoiler, deploy, node
from narrow import NarrowBody
from real import ROOT, events, hashes

import fedsim
from fedsim.cli.main import command
from fedsim.errors import ClientError, ConfigError, EngineError
from fedsim.flower import nodes as nodes_module
from fedsim.flower import site
from fedsim.task.frozen import FrozenBase, base_of

SPEED = ("strategy=fedspeed", "rounds=4", "clients_per_round=3", "model=linear", "client.epochs=1")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


def simulated(*overrides: str, **given: Any) -> list[str]:
    settings = ["num_clients=3", "engine=serial", "tracker=quiet", *overrides]
    return [r["weights_hash"] for r in fedsim.simulate(settings, **given).rows]


def test_a_node_that_dies_and_returns_as_another_changes_no_bit(tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(3)}

    def die(message: Any) -> Error:
        nodes[201] = nodes.pop(101)
        return Error(GONE, "node unavailable")

    deploy(tmp_path, *SPEED, nodes=nodes, spoil=Spoiler(die, (3, 1)))
    assert hashes(tmp_path / "run") == simulated(*SPEED)
    lost = [e for e in events(tmp_path / "run") if e["event"] == "lost"]
    assert [(e["client"], e["node"]) for e in lost] == [(1, 101)]


def test_a_client_that_joins_late_is_dropped_until_then_and_the_replay_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(2)}

    def join(message: Any) -> None:
        nodes[102] = node(tmp_path, 2)

    settings = (*SPEED, "engine.wait_for=2", "engine.deadline=0.3")
    run, _ = deploy(tmp_path, *settings, nodes=nodes, spoil=Spoiler(join, (3, 0)))
    missing = [[f["client"] for f in row["failures"]] for row in run.rows]
    assert missing == [[2], [2], [], []]
    assert run.rows[0]["failures"][0]["kind"] == "dropped"
    assert "not connected within engine.deadline=0.3 s" in run.rows[0]["failures"][0]["reason"]
    assert hashes(tmp_path / "run") != simulated(*SPEED)
    assert command(["verify", str(tmp_path / "run")]) == 0
    assert "4 rounds identical" in capsys.readouterr().out


def test_an_update_that_was_lost_leaves_the_client_with_the_state_before_it(tmp_path: Path) -> None:
    """The node worked and wrote a new state, but nobody heard: the next round begins from the older one."""
    grid: list[LocalGrid] = []

    def swallow(message: Any) -> str:
        from fedsim.flower.client import app

        grid_nodes = nodes[message.metadata.dst_node_id]
        from flwr.app import Context, RecordDict

        app(message, Context(1, 1, grid_nodes, RecordDict(), {"overrides": overrides}))
        return "silent"

    nodes = {100 + c: node(tmp_path, c) for c in range(3)}
    settings = (*SPEED, "engine.deadline=0.3")
    overrides = " ".join(["num_clients=3", f"dir={tmp_path / 'run'}", "tracker=quiet", *settings])
    run, _ = deploy(tmp_path, *settings, nodes=nodes, spoil=Spoiler(swallow, (2, 1)))
    assert [len(row["failures"]) for row in run.rows] == [0, 1, 0, 0]
    assert "no reply within engine.deadline" in run.rows[1]["failures"][0]["reason"]
    assert command(["verify", str(tmp_path / "run")]) == 0
    assert not grid


def test_a_node_that_lost_its_state_says_so_and_begins_again(tmp_path: Path) -> None:
    def forget(message: Any) -> None:
        shutil.rmtree(tmp_path / "state-1")

    run, _ = deploy(tmp_path, *SPEED, spoil=Spoiler(forget, (3, 1)))
    told = run.per_client[run.per_client.metric == "state_restarted"]
    assert [(r.round, r.client) for r in told.itertuples()] == [(3, 1)]
    assert hashes(tmp_path / "run") != simulated(*SPEED)
    assert command(["verify", str(tmp_path / "run")]) == 0

    with pytest.raises(
        ClientError, match=r"client 1 lost its state of round 2: no .*client-1/state-000001-000"
    ):
        deploy(tmp_path / "b", *SPEED, "engine.lost_state=stop", spoil=Spoiler(
            lambda m: shutil.rmtree(tmp_path / "b/state-1"), (3, 1)
        ))  # fmt: skip


def test_state_files_carry_run_client_and_round_and_are_few(tmp_path: Path) -> None:
    from safetensors import safe_open

    deploy(tmp_path, *SPEED)
    run = json.loads((tmp_path / "run/deployment.json").read_text())["run"]
    files = sorted((tmp_path / "state-2" / run / "client-2").iterdir())
    assert [f.name for f in files] == ["state-000002-000.safetensors", "state-000003-000.safetensors"]
    with safe_open(files[-1], framework="pt") as f:
        about = f.metadata()
        assert len(about.pop("content")) == 64
        assert about == {"run": run, "client": "2", "round": "3", "exchange": "0", "format": "2"}


def test_a_restarted_server_goes_on_from_its_checkpoint_with_the_nodes_state(tmp_path: Path) -> None:
    def stop(message: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(tmp_path, *SPEED, spoil=Spoiler(stop, (3, 2)))
    assert len(hashes(tmp_path / "run")) == 2
    _, grid = deploy(tmp_path, *SPEED)
    assert {ask["round"] for _, kind, ask in grid.log if kind == "train"} == {2, 3}
    assert hashes(tmp_path / "run") == simulated(*SPEED)
    assert command(["verify", str(tmp_path / "run")]) == 0
    told = [e for e in events(tmp_path / "run") if e["event"] in ("run", "resumed", "ended")]
    assert [(e["event"], e.get("status"), e.get("done")) for e in told] == [
        ("run", None, None),
        ("ended", "interrupted", None),
        ("resumed", None, 2),
        ("ended", "done", None),
    ]


def test_a_node_that_went_away_while_it_was_asked_who_it_is_is_waited_for(tmp_path: Path) -> None:
    """It is back by the time that the word comes: nobody was refused, and the run does not end for it."""
    gone = [102]

    def away(message: Any) -> Error | None:
        if message.metadata.dst_node_id in gone:
            return Error(GONE, f"node {gone.pop()} unavailable")
        return None

    deploy(tmp_path, *SPEED, spoil=away)
    assert hashes(tmp_path / "run") == simulated(*SPEED)
    told = [(e["event"], e["node"]) for e in events(tmp_path / "run") if e["event"] in ("silent", "refused")]
    assert told == [("silent", 102)]


def test_a_second_node_for_a_client_is_refused_by_name(tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(3)} | {199: node(tmp_path / "elsewhere", 1)}
    deploy(tmp_path, *SPEED, nodes=nodes)
    assert hashes(tmp_path / "run") == simulated(*SPEED)
    refused = [e for e in events(tmp_path / "run") if e["event"] == "refused"]
    assert refused
    assert all("client 1 is node" in e["reason"] and "another partition-id" in e["reason"] for e in refused)

    nodes = {100: node(tmp_path / "c", 0), 101: node(tmp_path / "c", 1), 102: node(tmp_path / "d", 1)}
    with pytest.raises(
        EngineError, match=r"2 of 3 clients are there; missing: 2(?s:.*)client 1 is node 10. on"
    ):
        deploy(tmp_path / "c", *SPEED, nodes=nodes)


def test_two_nodes_of_one_machine_with_the_same_state_are_told_apart(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()", "flower-superexec"], stdin=subprocess.PIPE)
    try:
        deploy(tmp_path, *SPEED)
        path = tmp_path / "state-1/nodes/client-1.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": other.pid}))
        with pytest.raises(EngineError, match=f"client 1 is served by another node .*process {other.pid}"):
            deploy(tmp_path, *SPEED, "resume=never")
    finally:
        other.communicate(b"\n")
    deploy(tmp_path, *SPEED, "resume=never")  # the other one is gone


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WIRE", 1, "its fedsim speaks version 1 to nodes, this one 6; install the same"),
        ("layout_name", lambda model: "[]", "its model has other parameters than the server's"),
        (
            "base_of",
            lambda model: FrozenBase("theirs", "ab" * 32),
            r"the frozen base of its model is 'theirs' \(sha256 abababababab\), the server's is trained as a whole",
        ),
    ],
)
def test_another_version_or_model_is_refused_by_name(
    name: str, value: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, name, value)
    with pytest.raises(EngineError, match=reason):
        deploy(tmp_path, *SPEED)
    assert hashes(tmp_path / "run") == []
    last = events(tmp_path / "run")[-1]
    assert (last["event"], last["status"]) == ("ended", "failed") and re.search(reason, last["error"])


def test_a_frozen_base_is_compared_before_round_1_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("rounds=2", "clients_per_round=3", "model=linear", "model._target_=narrow.NarrowBody")
    bits = simulated(*settings)
    deploy(tmp_path / "a", *settings)
    assert hashes(tmp_path / "a/run") == bits
    own = base_of(NarrowBody((4,), 2))
    monkeypatch.setattr(site, "base_of", lambda model: own)
    said = rf"the frozen base of its model is '{own.name}' \(.*\), the server's is 'NarrowBody' \(.*\); load the same"
    with pytest.raises(EngineError, match=said):
        deploy(tmp_path / "b", *settings)


def test_other_data_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = site.Site.describe

    def otherwise(self: Any) -> dict[str, Any]:
        return describe(self) | ({"partition": "another"} if self.node.client == 1 else {})

    monkeypatch.setattr(site.Site, "describe", otherwise)
    with pytest.raises(EngineError, match=r"client 1, node 101 on .*: its partition of the data differs"):
        deploy(tmp_path, *SPEED)


def test_a_process_that_breaks_down_is_tried_again_then_skipped_or_the_end(tmp_path: Path) -> None:
    def crash(message: Any) -> Error:
        return Error(2, "out of memory")

    settings = (*SPEED, "failures.retries=1")
    deploy(tmp_path / "a", *settings, spoil=Spoiler(crash, (2, 0)))
    assert hashes(tmp_path / "a/run") == simulated(*SPEED)
    crashes = [e for e in events(tmp_path / "a/run") if e["event"] == "crashed"]
    assert [(e["round"], e["client"], e["node"], e["reason"]) for e in crashes] == [
        (2, 0, 100, "out of memory")
    ]
    run, _ = deploy(tmp_path / "b", *settings, "failures.policy=skip", spoil=Spoiler(crash, (2, 0), (2, 0)))
    assert "its process broke down: out of memory" in run.rows[1]["failures"][0]["reason"]
    with pytest.raises(ClientError, match="client 0 failed in round 2: its process broke down"):
        deploy(tmp_path / "c", *SPEED, spoil=Spoiler(crash, (2, 0)))


def test_the_engine_of_a_deployment_is_nothing_to_simulate_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedsim deploy local"):
        fedsim.simulate(["engine=flower"])
    with pytest.raises(ConfigError, match="Centralised needs all data in one place"):
        deploy(tmp_path, "strategy=centralised", "clients_per_round=1")


def test_flower_is_imported_in_one_package_only() -> None:
    found = set()
    for package in ("fedsim", "strategies", "clients"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(r"^\s*(import|from) (flwr|fedsim\.flower)\b", path.read_text(), re.MULTILINE):
                found.add(str(path.relative_to(ROOT)))
    own = {p for p in found if not p.startswith("fedsim/flower/")}
    assert own == {
        "fedsim/cli/verify.py",
        "fedsim/replay/again.py",
    }  # a deployment computed again; fedsim deploy and provision by name
