"""Two sweeps into one name: each run is computed once, and both print the whole table."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import Simulator, simulator  # noqa: F401 - a fixture
from test_command_process import ROOT

from fedsim.cli.main import command
from fedsim.errors import LockedError
from fedsim.run.folder import locked, wait
from fedsim.run.key import run_dir
from fedsim.tracking import read_rows


@pytest.fixture
def busy(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> list[int]:  # noqa: F811
    """Seeds whose runs another process computes, until each was tried once and waited for once."""
    seeds, waited, plain = [0], [], simulator.run

    def run(config: Any) -> Any:
        if config.seed in seeds and run_dir(config) not in waited:
            raise LockedError(run_dir(config))
        return plain(config)

    monkeypatch.setattr(simulator, "run", run)
    monkeypatch.setattr("fedsim.run.folder.wait", waited.append)
    return seeds


def test_a_sweep_comes_back_to_a_run_that_another_one_computes(
    busy: list[int],
    simulator: Simulator,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(["-m", "seed=0,1,2"]) == 0
    assert [config.seed for config in simulator.ran] == [1, 2, 0]
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if "another process" in line]
    assert len(told) == 2 and all(line.startswith("job 0 (seed=0): ") for line in told)
    assert told[0].endswith("is being computed by another process; later")
    assert "waiting for another process that computes runs/default/fedavg-s0-" in told[1]
    assert "table 3 None" in out


def test_a_run_alone_says_that_its_folder_is_taken(
    busy: list[int],
    simulator: Simulator,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(["seed=0"]) == 2
    assert "another process is writing this run; wait for it, or give dir=..." in capsys.readouterr().err


def test_a_folder_is_waited_for_until_it_is_free(tmp_path: Path) -> None:
    times = []

    def waiting() -> None:
        wait(tmp_path)
        times.append(time.monotonic())

    with locked(tmp_path):
        thread = threading.Thread(target=waiting)
        thread.start()
        time.sleep(0.2)
        free = time.monotonic()
    thread.join(10)
    assert times and times[0] >= free


TINY = ("engine=serial", "client.epochs=1", "num_clients=5", "tracker=quiet", "tracker.plots=false", "name=n")
TINY += ("evaluation.every=1000",)


def sweep(cwd: Path, *argv: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "fedsim.cli", "-m", *TINY, *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_sweeps_at_once_compute_each_run_once(tmp_path: Path) -> None:
    both = [sweep(tmp_path, "seed=0,1", "rounds=20") for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    folders = sorted(tmp_path.glob("runs/n/fedavg-s*"))
    assert len(folders) == 2
    for folder in folders:
        assert [row["round"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, 21))
        assert all(f"results: runs/n/{folder.name}" in out for out in said)


@pytest.mark.nightly
def test_jobs_over_rounds_that_share_a_folder_run_side_by_side(tmp_path: Path) -> None:
    process = sweep(tmp_path, "rounds=4,8", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    (folder,) = tmp_path.glob("runs/n/fedavg-s0-*")
    assert [row["round"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, 9))
