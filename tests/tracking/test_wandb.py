import json
import socket
import sys
import types

import pytest
from wandb_file import history, kind, records

from fedsim.errors import ConfigError
from fedsim.tracking import RunInfo
from fedsim.tracking.wandb import WandbTracker, choose_mode


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No key, no network, nothing outside the temporary folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def info(folder, start_round=0):
    config = {"seed": 3, "strategy": {"rho": 0.1}}
    return RunInfo(folder, "fedspeed-s3", "sweep", "fedspeed", config, 3, start_round, tags=["paper"])


def play(tracker, run, rounds):
    tracker.start(run)
    for at in rounds:
        clients = [{"round": at, "client": c, "metric": "accuracy", "value": at + c / 10} for c in (0, 1)]
        row = {
            "round": at,
            "accuracy": (0.2, 0.9, 0.4)[at - 1],
            "loss": 1.0,
            "cohort": [0, 1],
            "failures": [],
        }
        tracker.round(row, clients)
    tracker.end({"status": "done", "accuracy": 0.4})


def test_offline_run_read_back(tmp_path):
    wandb = pytest.importorskip("wandb")
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "partition.png")
    play(WandbTracker("offline", "project"), info(tmp_path), [1, 2, 3])
    play(WandbTracker("offline", "project"), info(tmp_path, start_round=2), [3])
    wandb.teardown()  # else the file may not be complete yet

    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: "-r2-" in path.name)
    assert len(paths) == 2
    found = list(records(paths[0]))
    (run,) = kind(found, "run")
    assert (run.run_group, run.job_type, run.project) == ("sweep", "fedspeed", "project")
    assert list(run.tags) == ["paper"]
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["seed"] == 3 and config["strategy"] == {"rho": 0.1}
    metrics = [(m.name or m.glob_name, m.step_metric) for m in kind(found, "metric")]
    assert {("round", ""), ("*", "round")} <= set(metrics)

    rows = history(found)
    assert [(row["round"], row["accuracy"]) for row in rows if "accuracy" in row] == [
        (1, 0.2),
        (2, 0.9),
        (3, 0.4),
    ]
    assert rows[0]["cohort_size"] == 2 and rows[0]["failures"] == 0 and "cohort" not in rows[0]
    assert any(row.get("clients._type") == "table-file" for row in rows)
    assert any(row.get("partition._type") == "image-file" for row in rows)
    (table,) = paths[0].parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[3, 0, "accuracy", 3.0], [3, 1, "accuracy", 3.1]]
    final = {update.key: json.loads(update.value_json) for s in kind(found, "summary") for update in s.update}
    assert (final["status"], final["final/accuracy"]) == ("done", 0.4)
    (end,) = kind(found, "exit")
    assert end.exit_code == 0

    (second,) = kind(list(records(paths[1])), "run")
    assert second.run_group == "sweep" and second.run_id != run.run_id
    assert second.display_name == "fedspeed-s3-r2"


def test_without_the_package(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    play(WandbTracker("auto", "project"), info(tmp_path), [1, 2])
    (record,) = caplog.records
    assert "pip install 'fedsim-lab[wandb]'" in record.getMessage()
    with pytest.raises(ConfigError, match="pip install"):
        WandbTracker("online", "project").start(info(tmp_path))


def fake(init):
    """A stand-in for the package, with an ``init`` of one's own."""
    settings = types.SimpleNamespace(base_url="https://wandb.invalid")
    return types.SimpleNamespace(
        init=init, Settings=dict, setup=lambda: types.SimpleNamespace(settings=settings), __name__="wandb"
    )


class FakeRun:
    def define_metric(self, *args, **options):
        pass


def test_auto_falls_back_to_offline_when_online_fails(tmp_path, monkeypatch, caplog):
    modes = []

    def init(*, mode, **options):
        modes.append(mode)
        if mode == "online":
            raise RuntimeError("401")
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", fake(init))
    monkeypatch.setattr("fedsim.tracking.wandb.choose_mode", lambda package: "online")
    WandbTracker("auto", "project").start(info(tmp_path))
    assert modes == ["online", "offline"]
    assert "401" in caplog.text and "offline" in caplog.text


def test_online_fails_loudly(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", fake(init))
    with pytest.raises(ConfigError, match=r"No API key configured.*wandb login"):
        WandbTracker("online", "project").start(info(tmp_path))


def test_auto_needs_a_key_and_a_server(monkeypatch, caplog, tmp_path):
    package = fake(None)
    assert choose_mode(package) == "offline"
    assert "no key configured" in caplog.text
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert choose_mode(package) == "online"
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert choose_mode(package) == "offline"
        monkeypatch.delenv("WANDB_MODE")
    caplog.clear()
    assert choose_mode(package) == "offline"
    assert "cannot be reached" in caplog.text
