"""Every method runs with noise on its sums and resumes with the same bits, or is refused by name before round 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import compose_quickly
from problems import classification, hashes
from registry import TABLE, Entry

from fedsim.errors import ConfigError

PRIVATE = (
    "privacy=client",
    "privacy.z=0.5",
    "privacy.delta=1e-2",
    "participation=bernoulli",
    "client.steps=2",
)
REFUSED = {  # more than sums leaves their clients, or another rule than the mean makes something of it
    *("one-byte", "decomfl", "fedkseed", "centered"),
    *("gossip", "fedproto", "ggeur", "ggeur-scaffold", "fraug", "flag", "flag-reverse", "logit-adjust-all"),
    *(
        "qfedavg",
        "term",
        "afl",
        "ifca",
        "fesem",
        "cfl",
        "fedossl",
        "heterofl",
        "fedmatch",
        "fedbuff",
        "fedasync",
    ),
    *("one-shot", "co-boosting", "dense", "feddf", "fens", "analytic"),
}
DAILY = {"fednova", "scaffold"}
CASES = [pytest.param(e, id=e.label, marks=[] if e.label in DAILY else pytest.mark.nightly) for e in TABLE]


def settings(entry: Entry) -> tuple[str, ...]:
    """A private run of the method, all updates of which weigh the same."""
    strategy = compose_quickly(list(entry.arguments)).strategy
    weights = [
        f"strategy{part}.weighting=uniform"
        for part, node in (("", strategy), (".base", strategy.get("base")))
        if node is not None and "weighting" in node
    ]
    return (*PRIVATE, *entry.arguments, *weights)


@pytest.mark.nightly
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.label) for e in TABLE if e.label not in REFUSED])
def test_any_workers_give_the_same_bits(entry: Entry, ray: str) -> None:
    alone = classification(cohorts=None).run(*settings(entry))
    for workers in (1, 2, 4):
        result = classification(cohorts=None).run(*settings(entry), ray, f"engine.workers={workers}")
        assert hashes(result) == hashes(alone)


@pytest.mark.parametrize("entry", CASES)
def test_runs_and_resumes_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    given = (*settings(entry), "checkpoint.every=1")
    problem = classification(cohorts=None)
    if entry.label in REFUSED:
        with pytest.raises(ConfigError, match=r"privacy=client|aggregator|sampling"):
            problem.run(*given)
        return
    whole = problem.run(*given, "rounds=3")
    assert len(set(hashes(whole))) == 3 and whole.summary["privacy"]["epsilon"] > 0
    problem.run(*given, "rounds=2", f"dir={tmp_path}")
    assert hashes(problem.run(*given, "rounds=3", f"dir={tmp_path}")) == hashes(whole)
