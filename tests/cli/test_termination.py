"""SIGTERM, as Slurm sends it: the last finished round is kept, the code is 143, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import Simulator, simulator  # noqa: F401 - a fixture
from test_command_process import ROOT

from fedsim.cli.exits import TERMINATED, Terminated, terminable
from fedsim.cli.main import command
from fedsim.tracking import read_rows


def sent(*argv: str, cwd: Path, after: int, group: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a run in ``cwd/run`` that gets SIGTERM after some rounds, alone or with its workers."""
    line = [sys.executable, "-m", "fedsim.cli", *argv, "dir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        line, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    last = time.monotonic() + 120
    while time.monotonic() < last and len(weights(cwd / "run")) < after:
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def weights(folder: Path) -> list[str]:
    rows = folder / "metrics.jsonl"
    return [row["weights_hash"] for row in read_rows(rows)] if rows.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "group"),
    [
        pytest.param("serial", False, marks=pytest.mark.nightly),
        ("ray", False),
        pytest.param("ray", True, marks=pytest.mark.nightly),
    ],
    ids=["serial", "ray", "all-of-ray"],
)
def test_a_terminated_run_leaves_with_143_and_goes_on_with_the_same_bits(
    engine: str, group: bool, tmp_path: Path
) -> None:
    settings = ["strategy=scaffold", "client.epochs=1", "evaluation.every=1000", "checkpoint.every=0"]
    settings += ["tracker=quiet", "tracker.plots=false", "num_clients=6"]
    parts = [*settings, f"engine={engine}"] + ["engine.workers=2"] * (engine == "ray")
    code, err = sent(*parts, "rounds=100000", cwd=tmp_path, after=3, group=group)
    assert code == TERMINATED and "fedsim: terminated (SIGTERM); the same command goes on" in err
    done = len(weights(tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", done)
    for folder in ("run", "straight"):
        line = [*settings, "engine=serial", f"rounds={done + 2}", f"dir={tmp_path / folder}"]
        assert command(line) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert len(weights(tmp_path / "run")) == done + 2


def test_sigterm_ends_a_sweep_and_its_finished_runs_are_in_a_table(
    simulator: Simulator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = simulator.run

    def run(config: Any) -> Any:
        if config.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return plain(config)

    monkeypatch.setattr(simulator, "run", run)
    assert command(["-m", "seed=0,1,2"]) == TERMINATED
    assert [config.seed for config in simulator.ran] == [0]
    out, err = capsys.readouterr()
    assert "table 1 None" in out and "fedsim: terminated (SIGTERM)" in err
    assert command(["-m", "seed=0"]) == 0, "and SIGTERM is as it was before"


def test_a_second_sigterm_would_end_the_process_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.nightly
def test_jobs_in_other_processes_end_with_their_sweep(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "fedsim.cli",
        "-m",
        "seed=0,1",
        "engine=serial",
        "rounds=100000",
        "name=jobs",
    ]
    line += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "tracker=quiet", "evaluation.every=1000"]
    process = subprocess.Popen(
        [*line, "checkpoint.every=0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    last = time.monotonic() + 120
    while time.monotonic() < last and sum(map(bool, map(weights, tmp_path.glob("runs/jobs/*")))) < 2:
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, err
    rows = [len(weights(folder.parent)) for folder in tmp_path.glob("runs/jobs/*/metrics.jsonl")]
    kept = [int(path.name[-6:]) for path in tmp_path.glob("runs/jobs/*/checkpoint/round-*")]
    assert len(rows) == 2 and sorted(rows) == sorted(kept)
