"""What is left at a node: state files that are what was written, for no longer than said, and nothing decoded."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import Spoiler, deploy, node
from test_wire import LAYOUT

from fedsim.data.cache import cached, not_cached
from fedsim.errors import ConfigError, EngineError
from fedsim.flower import nodes as nodes_module
from fedsim.flower.nodelog import briefly
from fedsim.flower.options import Node
from fedsim.flower.replay import DeploymentRecord
from fedsim.flower.standing import StandingFile
from fedsim.flower.statefiles import DAY, StateFiles, forget_old

SPEED = ("strategy=fedspeed", "rounds=3", "clients_per_round=3", "model=linear", "client.steps=1")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def changed(path: Path) -> None:
    """The same file with other numbers, as whoever writes to the disk could make it."""
    with safe_open(path, framework="pt") as f:
        about = f.metadata()
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata=about)


def test_a_state_that_was_changed_on_disk_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = StateFiles(tmp_path, "0" * 16, 3, LAYOUT)
    files.write((2, 0), {"h": torch.ones(LAYOUT.dim), "n": torch.tensor([3])})
    found = files.read((2, 0))
    assert found is not None and found["n"].tolist() == [3] and bool((found["h"] == 1).all())
    changed(files.path((2, 0)))
    assert files.read((2, 0)) is None
    assert "is damaged: it does not hold what was written" in caplog.text


def test_the_client_whose_state_was_changed_begins_again_and_is_named(tmp_path: Path) -> None:
    def act(message: Any) -> None:
        (path,) = (tmp_path / "state-1").rglob("state-000001-*.safetensors")
        changed(path)

    run, _ = deploy(tmp_path, *SPEED, spoil=Spoiler(act, (3, 1)))
    told = run.per_client[run.per_client.metric == "state_restarted"]
    assert [(r.round, r.client) for r in told.itertuples()] == [(3, 1)]


@pytest.mark.parametrize("run", ["../../etc", "a/b", "/tmp/x", "", ".", "..", "a" * 65, "run\n", 7])
def test_the_name_of_a_run_is_no_path(run: Any, tmp_path: Path) -> None:
    for files in (StateFiles, StandingFile):
        with pytest.raises(ConfigError, match="no name of a run"):
            files(tmp_path, run, 1, LAYOUT)


def test_a_server_that_sends_a_path_for_a_run_is_refused_by_the_node(tmp_path: Path) -> None:
    def act(message: Any) -> None:
        message.content["ask"]["run"] = "../../../elsewhere"

    settings = (*SPEED, "failures.policy=skip")
    run, _ = deploy(tmp_path / "a", *settings, spoil=Spoiler(act, (2, 1)))
    (failure,) = run.rows[1]["failures"]
    assert failure["client"] == 1
    assert "elsewhere" in failure["reason"]
    assert list(tmp_path.rglob("*elsewhere*")) == []


def test_runs_of_long_ago_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    for name in ("0" * 16, "1" * 16, "2" * 16):
        StateFiles(tmp_path, name, 0, LAYOUT).write((0, 0), {"h": torch.ones(2)})
    (tmp_path / "nodes").mkdir()
    (tmp_path / ("3" * 16)).mkdir()
    (tmp_path / ("3" * 16) / "thesis.txt").write_text("mine")
    (tmp_path / ("0" * 16) / "client-0" / "gone").symlink_to("nowhere")
    for path in tmp_path.rglob("*"):
        if "1" * 16 not in str(path):
            os.utime(path, (0, 0), follow_symlinks=False)
    assert forget_old(tmp_path, 30, but="2" * 16) == ["0" * 16]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1" * 16, "2" * 16, "3" * 16, "nodes"]
    assert forget_old(tmp_path / "none", 30, but="") == []
    assert DAY == 24 * 3600


def test_how_long_is_the_nodes_own_setting(tmp_path: Path) -> None:
    old = StateFiles(tmp_path / "state-1", "a" * 16, 1, LAYOUT)
    old.write((0, 0), {"h": torch.ones(2)})
    for path in (tmp_path / "state-1").rglob("*"):
        os.utime(path, (1, 1))
    deploy(tmp_path, *SPEED, nodes={100 + c: node(tmp_path, c, **{"state.keep_days": 2}) for c in range(3)})
    assert not old.folder.exists()
    assert Node.of({}, 1, 0).keep_days == 30
    for wrong in (0, -1, True, "long"):
        with pytest.raises(
            ConfigError, match=f"state.keep_days={wrong!r}: must be a positive number of days"
        ):
            Node.of({"state.keep_days": wrong}, 1, 0)


def test_nodes_leave_nothing_decoded_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> dict[str, Any]:
        return {"x": torch.ones(2).numpy()}

    monkeypatch.delenv("FEDSIM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with not_cached():
        assert cached("images", ["k"], build)["x"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "kept"))  # the node's own wish
    with not_cached():
        cached("images", ["k"], build)
    assert [p.name.split("-")[0] for p in (tmp_path / "kept").iterdir()] == ["images"]


def test_tracebacks_stay_in_the_nodes_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = (
        "strategy._target_=careless.Broken",
        "failures.policy=skip",
        "rounds=1",
        "clients_per_round=3",
    )
    run, _ = deploy(tmp_path, *settings, "client.steps=1")
    said = {f["reason"] for f in run.rows[0]["failures"]}
    assert said == {"ValueError: patient 7 (careless.py, line 32); the traceback is in the node's log"}
    assert "Traceback (most recent call last)" in caplog.text
    assert "client 2 failed in round 1" in caplog.text
    assert "/" not in next(iter(said)).replace("state", "")


def test_what_is_no_traceback_is_said_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert briefly("ClientError: a\nb", 1, 2) == "ClientError: a; the traceback is in the node's log"
    assert "client 1 failed in round 2:\nClientError: a\nb" in caplog.text


def test_state_files_say_their_content(tmp_path: Path) -> None:
    deploy(tmp_path, *SPEED)
    run = json.loads((tmp_path / "run/deployment.json").read_text())["run"]
    for path in (tmp_path / "state-2" / run / "client-2").iterdir():
        with safe_open(path, framework="pt") as f:
            assert len(f.metadata()["content"]) == 64


def test_what_a_function_of_the_hospitals_raises_stays_in_the_nodes_log(tmp_path: Path, caplog: Any) -> None:
    nodes = {10: node(tmp_path, 0, **{"data-path": "ward 7", "own-data": True, "allow": "careless"})}
    settings = ("data=own", "data._target_=careless.own_data", "data.path=none", "clients_per_round=1")
    with pytest.raises(EngineError) as refused:
        deploy(tmp_path, *settings, clients=1, nodes=nodes)
    assert "client 0: its data cannot be read; the node's log says why" in str(refused.value)
    assert "Smith" not in str(refused.value) and "KeyError: 'patient Smith in ward 7'" in caplog.text


@pytest.mark.parametrize(
    ("about", "rows"),
    [("[]", ""), ("{}", ""), ("x", ""), ('{"own_data": false}', '{"a": 1}\n'),
     ('{"own_data": false}', '{"event": "absent", "round": 1}\n'),
     ('{"own_data": false}', '{"event": "absent", "round": "x"}\n')],
)  # fmt: skip
def test_a_damaged_record_of_a_deployment_is_said_in_a_line(about: str, rows: str, tmp_path: Path) -> None:
    (tmp_path / "deployment.json").write_text(about)
    (tmp_path / "nodes.jsonl").write_text(rows)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "cohort": [0]}\n')
    with pytest.raises(ConfigError, match="the record of this deployment is damaged"):
        DeploymentRecord.of(tmp_path)
