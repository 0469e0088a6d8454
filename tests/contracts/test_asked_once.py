"""What one-shot methods promise of their first round, the only one in which all clients are asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from problems import Problem, classes, classification, hashes, network
from registry import ONE_SHOT, Entry, mostly
from trial import run_hooked

each_once = pytest.mark.parametrize("entry", mostly(ONE_SHOT), ids=lambda e: e.label)


@each_once
def test_while_nobody_is_there_nothing_changes_and_then_it_begins(entry: Entry) -> None:
    """Two rounds without anybody, then the first two rounds of a run that begins at once."""
    late = classification(cohorts=[[], [], [0, 1, 4], []]).run(*entry.arguments)
    early = classification(cohorts=[[0, 1, 4], [], [], []]).run(*entry.arguments)
    start = classification(cohorts=[[]]).run("strategy=fedavg", "rounds=1")
    assert hashes(late)[:2] == hashes(start) * 2
    assert hashes(late)[2:] == hashes(early)[:2]
    assert [r["bytes_up"] > 0 for r in late.rows] == [False, False, True, False]
    assert late.summary.get("uploads_hash") == early.summary.get("uploads_hash")


@each_once
def test_one_client_is_enough(entry: Entry) -> None:
    problem = Problem(network(), classes((8,)), ("rounds=2", "clients_per_round=1"), test=classes((5,))[0])
    found = problem.run(*entry.arguments, "client.batch_size=4")
    assert found.rows[0]["cohort"] == [0] and found.summary["accuracy"] >= 0


@each_once
def test_who_fails_in_the_first_round_is_not_among_the_models(entry: Entry) -> None:
    if entry.strategy == "analytic":
        pytest.skip("its clients train nothing")

    def fail(job: Any) -> None:
        if job.client in (1, 3):
            raise ValueError("has had enough")

    _, result = run_hooked(entry, fail, classification(), "failures.policy=skip", "rounds=2")
    index = json.loads((result.dir / "uploads" / "uploads.json").read_text())
    assert [line["client"] for line in index["clients"]] == [0, 2, 4, 5]
    assert [(f["client"], f["kind"]) for f in result.rows[0]["failures"]] == [(1, "failed"), (3, "failed")]
    assert result.rows[0]["models"] == 4
