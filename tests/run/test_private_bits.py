"""Private runs repeat: the same bits and the same spending on any workers, and after the run's process was killed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from problems import classification, hashes

pytestmark = pytest.mark.slow
CLIENT = ("privacy=client", "privacy.z=1", "privacy.delta=1e-2", "strategy.weighting=uniform")
ADAPTIVE = (*CLIENT, "privacy.clip=adaptive", "privacy.adaptive.noise=2", "participation=bernoulli")
STAGES = {
    "adaptive-qsgd": (*ADAPTIVE, "compression=qsgd", "compression.feedback=true"),
    "client-masks-two-vectors": (*CLIENT, "strategy=scaffold", "secagg=masks", "secagg.most=4"),
    "local": ("privacy=local", *CLIENT[1:]),
    "record": ("privacy=record", *CLIENT[1:3]),
}
SPENT = ("epsilon", "z", "C", "clipped", "noise_norm")


def spending(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row.get(name) for name in SPENT] for row in rows]


@pytest.mark.parametrize(
    "stage", ["adaptive-qsgd", *(pytest.param(s, marks=pytest.mark.nightly) for s in list(STAGES)[1:])]
)
def test_any_workers_give_the_same_bits(ray: str, stage: str) -> None:
    problem = classification(cohorts=None)
    alone = problem.run(*STAGES[stage])
    for workers in (1, 2) if stage != "local" else (1, 2, 4):
        result = problem.run(*STAGES[stage], ray, f"engine.workers={workers}")
        assert hashes(result) == hashes(alone) and spending(result.rows) == spending(alone.rows)


SCRIPT = """
import sys
from hooks import hooked
from problems import classification

def slow(job):
    if job.round == 3:
        print("in round 4", flush=True)
        sys.stdin.readline()

folder, *given = sys.argv[1:]
strategy = hooked("fedavg", slow, "strategy.weighting=uniform")
classification(cohorts=None).run(*given, "rounds=6", "checkpoint.every=2", f"dir={folder}", strategy=strategy)
print("finished", flush=True)
"""


def start(folder: Path, waits: bool = False) -> subprocess.Popen[str]:
    given = [one for one in STAGES["adaptive-qsgd"] if not one.startswith("strategy")]
    words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), *given]
    given_in = subprocess.PIPE if waits else subprocess.DEVNULL
    return subprocess.Popen(words, stdin=given_in, stdout=subprocess.PIPE, text=True, start_new_session=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_in_the_middle_of_a_round_it_goes_on_to_the_same_bits_and_spends_nothing_twice(
    tmp_path: Path,
) -> None:
    """Round 3 is released a second time with the same noise: the checkpoint is of round 2."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "finished" in start(whole).communicate(timeout=120)[0]
    process = start(killed, waits=True)
    assert process.stdout is not None
    assert any("in round 4" in line for line in process.stdout)
    process.kill()
    process.wait(30)
    assert [one["round"] for one in lines(killed / "privacy.jsonl")] == [1, 2, 3]
    assert "finished" in start(killed).communicate(timeout=120)[0]
    rows, expected = lines(killed / "metrics.jsonl"), lines(whole / "metrics.jsonl")
    assert [row["weights_hash"] for row in rows] == [row["weights_hash"] for row in expected]
    assert spending(rows) == spending(expected)
    ledger = [one["round"] for one in lines(killed / "privacy.jsonl")]
    assert ledger == [1, 2, 3, 3, 4, 5, 6]
