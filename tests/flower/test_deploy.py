"""``fedsim deploy local`` as users call it, and Flower's own simulation engine running the same apps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until
from real import LIMIT, ROOT, federation, hashes, left_over, marked, wait

import fedsim
from fedsim.cli.main import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = ("model=linear", "client.epochs=1", "tracker.plots=false")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """``fedsim deploy local`` in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", "deploy", "local", *arguments],
        cwd=folder,
        env={**os.environ, **marked(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_deploy_local_shows_progress_ends_like_the_simulation_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line = ["--nodes", "2", "rounds=1", *SMALL]
    process = start(tmp_path, *command_line)
    out, _ = process.communicate(timeout=2 * LIMIT)
    assert process.returncode == 0, out
    for text in ("starting 2 SuperNodes", "round 1/1", "done", "results: runs/default/fedavg-s0-"):
        assert text in out
    (folder,) = (tmp_path / "runs/default").glob("*-flower")
    alone = fedsim.simulate(["engine=serial", "num_clients=2", "clients_per_round=2", "rounds=1", *SMALL])
    assert hashes(folder) == [r["weights_hash"] for r in alone.rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
    assert command(["deploy", "local", *command_line]) == 0
    assert "already done, skipped" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_deploy_local_takes_everything_with_it_however_it_ends(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, "--nodes", "1", "rounds=1", *SMALL)
    wait_until(lambda: any("supernode" in line for line in left_over(tmp_path)), LIMIT, "a SuperNode")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), out
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")


def test_mistakes_are_found_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["deploy", "local", "num_clients=20"]) == 2
    assert "give --nodes 20, or leave num_clients out" in capsys.readouterr().err
    assert command(["deploy", "local", "strategy=fedsped"]) == 2
    assert "fedspeed" in capsys.readouterr().err
    assert command(["deploy", "far"]) == 2
    capsys.readouterr()
    assert command(["deploy", "local", "--config-dir", "mine", "strategy=sign"]) == 2
    assert "strategy._target_=my_method.MyMethod" in capsys.readouterr().err


@pytest.mark.nightly
def test_flowers_own_simulation_runs_the_apps(tmp_path: Path) -> None:
    settings = (
        "num_clients=2",
        "clients_per_round=2",
        "rounds=2",
        "strategy=fedspeed",
        "tracker=quiet",
        *SMALL,
    )
    with federation(tmp_path, 0, link_options=["--insecure", "--simulation"]) as fed:
        resources = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
        text = " ".join([*settings, f"dir={tmp_path / 'run'}"])
        run = fed.submit(ROOT, text, "--federation-config", resources)
        assert wait(fed, run, tmp_path / "run")["status"] == "done"
    alone = fedsim.simulate(["engine=serial", *settings])
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
