"""A run whose own process is killed, or interrupted, goes on to the same bits and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from processes_alive import descendants, wait_until_gone

pytestmark = pytest.mark.slow
TWO = "engine.workers=2"


SCRIPT = """
import os, sys, time
import torch
import fedsim
from hooks import hooked
from problems import QUIET, classes, network

def slow(job):
    time.sleep(float(os.environ[os.environ["WHICH"]]))  # a computed name: no part of what a run is

class Progress:
    def round(self, row, clients):
        print("round", row["round"], flush=True)

engine, folder = sys.argv[1:]
fedsim.simulate(
    [f"engine={engine}", *QUIET, "strategy=fedspeed", "rounds=8", "clients_per_round=4", "checkpoint.every=2",
     "client.batch_size=4", "engine.chunks=4", f"dir={folder}", *(["engine.workers=2"] if engine == "ray" else [])],
    model=network("bn"), clients=classes(), callbacks=[Progress()],
    strategy=hooked("fedspeed", slow),
)
print("finished", flush=True)
"""


def launch(engine: str, folder: Path, delay: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", textwrap.dedent(SCRIPT), engine, str(folder)]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "WHICH": "DELAY", "DELAY": str(delay)},
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"never printed {line!r}: {process.stderr.read() if process.stderr else ''}")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finish(engine: str, folder: Path) -> list[str]:
    done = launch(engine, folder, 0)
    out, err = done.communicate(timeout=120)
    assert "finished" in out, err
    return [row["weights_hash"] for row in rows(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return finish("serial", tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("engine", [pytest.param("serial", marks=pytest.mark.nightly), "ray"])
def test_a_driver_killed_outright_resumes_to_the_same_bits_and_leaves_nothing_running(
    engine: str, tmp_path: Path, undisturbed: list[str]
) -> None:
    process = launch(engine, tmp_path / "killed", 0.05)
    wait_for(process, "round 5")
    children = descendants(process.pid)
    process.kill()
    process.wait(30)
    wait_until_gone(children)
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert finish(engine, tmp_path / "killed") == undisturbed


@pytest.mark.parametrize("engine", ["serial", pytest.param("ray", marks=pytest.mark.nightly)])
def test_ctrl_c_leaves_rows_and_a_checkpoint_of_the_last_finished_round(
    engine: str, tmp_path: Path, undisturbed: list[str]
) -> None:
    folder = tmp_path / "run"
    process = launch(engine, folder, 0.1)
    wait_for(process, "round 3")
    children = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    done = [row["round"] for row in rows(folder)]
    assert done == list(range(1, len(done) + 1))
    assert len(done) >= 3
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", len(done))
    assert [p.name for p in (folder / "checkpoint").glob("round-*")] == [f"round-{len(done):06d}"]
    wait_until_gone(children)
    assert finish(engine, folder) == undisturbed
