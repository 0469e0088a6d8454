"""What every strategy promises on devices that fail it: drop-outs, deadlines, and nobody there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import Die, hooked
from problems import Problem, classification, hashes, of_strategy, recorded
from registry import BROAD, CLOSE, COHORTS, MECHANISMS, METHODS, Entry, often
from trial import spread_cohorts

LOST = ["system=lognormal", *(f"system.dropout.{when}=0.2" for when in ("before", "during", "after"))]
LATE = ["system=lognormal", "system.deadline=0.5", "system.stragglers=drop"]


def record(entry: Entry, problem: Problem, *overrides: str) -> Any:
    return recorded(entry.strategy, problem, *entry.overrides, *overrides)


@pytest.mark.parametrize(
    ("entry", "fleet"),
    [
        pytest.param(e, fleet, id=f"{e.label}-{name}")
        for name, fleet in (("dropout", LOST), ("deadline", LATE))
        for e in METHODS
        if e in COHORTS and e.label not in CLOSE and (fleet is LOST or e.label in BROAD)
    ],
)
def test_a_dropped_client_is_as_if_it_had_not_been_asked(entry: Entry, fleet: list[str]) -> None:
    """Not in the weights, not in the state of any client, and named in the log."""
    if entry.adds_samples or entry.spreads:
        pytest.skip("who is lost in one exchange may have answered another of the same round")
    if entry.strategy == "fedsgd" and fleet is LATE:
        pytest.skip("one gradient is never late here")
    cohorts = [list(range(6)), [0, 1, 2, 4], [1, 3, 5], [0, 2, 4, 5]]
    chunks = "engine.chunks=1"
    strategy, result = record(entry, classification(cohorts=cohorts), *fleet, chunks)
    gone = [{f["client"] for f in row["failures"] if f["kind"] == "dropped"} for row in result.rows]
    assert any(gone) and any(len(g) < len(ids) for g, ids in zip(gone, cohorts, strict=True))
    without = [[c for c in ids if c not in g] for ids, g in zip(cohorts, gone, strict=True)]
    plain, expected = record(entry, classification(cohorts=without), chunks)
    assert hashes(result) == hashes(expected)
    for one, other in zip(strategy.kept, plain.kept, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.slow
@pytest.mark.parametrize("entry", often(MECHANISMS, "scaffold", "fedbuff"), ids=lambda e: e.label)
def test_a_worker_killed_in_mid_round_costs_no_bit(entry: Entry, ray: str, tmp_path: Path) -> None:
    problem, rest = classification(), [o for o in entry.overrides if not of_strategy(o)]
    settings = [f"strategy={entry.strategy}", *rest, "engine.chunks=3"]
    result = problem.run(
        *settings,
        ray,
        "engine.workers=2",
        strategy=hooked(entry.strategy, Die(3, tmp_path / "killed"), *entry.overrides),
    )
    assert (tmp_path / "killed").exists()
    assert hashes(result) == hashes(problem.run(*entry.arguments, "engine.chunks=3"))


@spread_cohorts
def test_rounds_nobody_is_there_for_change_nothing_but_the_time(entry: Entry, tmp_path: Path) -> None:
    if entry.trains_alone:
        pytest.skip("the server goes on alone: tests/strategies/test_semisupervised.py")
    (tmp_path / "trace.csv").write_text("client,start_s,end_s\n1,1500,3000\n")
    fleet = [
        "system=lognormal",
        "system/availability=trace",
        f"system.availability.path={tmp_path / 'trace.csv'}",
    ]
    fleet += ["+system.traces=.", "system.availability.period=3600", "system.idle=800"]
    strategy, result = record(entry, classification(), *fleet)
    assert [len(row["cohort"]) for row in result.rows] == [0, 0, 3, 3]
    assert [row["sim_seconds"] for row in result.rows[:2]] == [800, 800]
    first, second, third, _ = hashes(result)
    assert first == second != third
    for name, value in strategy.states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, strategy.states[1][name])
