"""A run that is killed outright in the middle of the server's work goes on to the same bits, from the same models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes_alive import descendants, wait_until_gone

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("samples=64", "batch_size=32", "noise=8", "width=16", "generator_steps=20")
WORDS = (
    "strategy=co_boosting",
    *(f"strategy.{option}" for option in SMALL),
    "model=mlp",
    "model.hidden=[16]",
    "num_clients=3",
    "clients_per_round=3",
    "rounds=40",
    "checkpoint.every=3",
    "tracker.plots=false",
    "evaluation.every=4",
)


def launch(place: Path, *engine: str) -> subprocess.Popen[bytes]:
    words = [*WORDS, *(engine or ("engine=serial",)), f"out={place / 'out'}", f"dir={place / 'run'}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "fedsim.cli", *words], env=env, stdout=subprocess.DEVNULL)


def rows(place: Path) -> list[dict[str, Any]]:
    path = place / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("at", "engine"),
    [
        (1, ("engine=serial",)),
        (5, ("engine=serial",)),
        (5, ("engine=ray", "engine.workers=2", "engine.early=false")),
    ],
)
def test_killed_in_the_middle_of_the_servers_work(at: int, engine: tuple[str, ...], tmp_path: Path) -> None:
    """After the models have come and before any checkpoint; between two checkpoints; and there on workers, of which
    none is left. Held against a serial run."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(straight).wait(300) == 0
    process = launch(killed, *engine)
    while len(rows(killed)) < at:
        assert process.poll() is None
        time.sleep(0.01)
    children = descendants(process.pid)
    process.kill()
    process.wait(30)
    wait_until_gone(children)
    assert not (killed / "run" / "summary.json").exists() and at <= len(rows(killed)) < 40
    models = (killed / "run" / "uploads" / "uploads.json").read_text()
    assert launch(killed, *engine).wait(300) == 0
    assert [r["weights_hash"] for r in rows(killed)] == [r["weights_hash"] for r in rows(straight)]
    assert (killed / "run" / "uploads" / "uploads.json").read_text() == models
