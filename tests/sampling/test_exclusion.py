"""Cohorts where some clients are never there: who is left stays, and others take the free places."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from problems import classes, classification, hashes
from scipy.stats import chisquare

from fedsim.errors import ConfigError
from fedsim.sampling import Oort, Population, PowerOfChoice, RoundRobin, Sampler, Uniform, Weighted
from fedsim.sampling.exclusion import Roster, draw_held_out

STATELESS: tuple[Sampler, ...] = (Uniform(), Weighted(), RoundRobin())


def population(m: int, absent: set[int] = frozenset(), **more: Any) -> Population:  # type: ignore[assignment]
    return Population(np.arange(1, m + 1), 3, absent=frozenset(absent), **more)


@pytest.mark.parametrize("rule", STATELESS, ids=lambda r: type(r).__name__)
def test_all_others_stay_and_free_places_are_filled(rule: Sampler) -> None:
    whole, few, more = population(30), population(30, {1, 4, 7}), population(30, {1, 4, 7, 9, 20})
    moved = 0
    for t in range(60):
        everybody, first, second = (set(rule(p, 8, t)) for p in (whole, few, more))
        assert len(first) == len(second) == 8
        assert everybody - few.absent <= first and not first & few.absent
        assert first - more.absent <= second and not second & more.absent  # nested sets agree
        moved += first != everybody
    assert moved > 10


@pytest.mark.parametrize("rule", STATELESS, ids=lambda r: type(r).__name__)
def test_or_a_cohort_shrinks(rule: Sampler) -> None:
    whole, few = population(30), population(30, {1, 4, 7}, fill=False)
    for t in range(40):
        assert set(rule(few, 8, t)) == set(rule(whole, 8, t)) - few.absent


def test_bernoulli_cohorts_shrink() -> None:
    whole, few = (population(30, a, participation="bernoulli") for a in (set(), {1, 4, 7}))
    assert [set(Uniform()(few, 8, t)) for t in range(40)] == [
        set(Uniform()(whole, 8, t)) - few.absent for t in range(40)
    ]


def test_cohorts_are_uniform_over_those_who_are_there() -> None:
    people = population(12, {0, 5})
    counts = np.zeros(12)
    for t in range(2000):
        counts[Uniform()(people, 4, t)] += 1
    assert not counts[[0, 5]].any()
    assert chisquare(np.delete(counts, [0, 5])).pvalue > 0.001


def test_fewer_than_asked_are_all_who_are_left_and_nobody_is_an_empty_cohort() -> None:
    assert Uniform()(population(6, {0, 1, 2}), 5, 0) == [3, 4, 5]
    assert Uniform()(population(6, {0, 1, 2}), 6, 0) == [3, 4, 5]
    assert Uniform()(population(6, set(range(6))), 5, 0) == []


@pytest.mark.parametrize(
    "rule",
    [
        PowerOfChoice(choice=2, loss="last"),
        Oort(
            explore=0.9, decay=0.98, least=0.2, penalty=2, preferred=None, duration=0.8, pace=0.05, window=2, clip=1,
            cutoff=0.95, most=None, choice=2, loss="steps",
        ),
    ],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
def test_rules_that_choose_among_candidates_choose_among_those_who_are_there(rule: Sampler) -> None:
    people = population(30, {1, 4, 7})
    for t in range(30):
        ids = rule(people, 8, t)
        assert len(ids) == 8 and not set(ids) & people.absent


def test_an_asynchronous_server_starts_others() -> None:
    people = population(10, {1, 4, 7})
    assert {c for t in range(20) for c in Uniform()(people, 3, t, 0, exclude={0})} == {2, 3, 5, 6, 8, 9}


def test_cost_follows_the_cohort() -> None:
    def seconds(m: int) -> float:
        people = population(m, set(range(0, m, 5)))
        start = time.perf_counter()
        for t in range(50):
            Uniform()(people, 10, t)
        return time.perf_counter() - start

    seconds(1000)
    assert min(seconds(1_000_000) for _ in range(3)) < 5 * min(seconds(1000) for _ in range(3))


def test_a_roster_says_who_is_there() -> None:
    assert list(Roster(5, frozenset({1, 3})).present) == [0, 2, 4] and len(Roster(5, frozenset({1, 3}))) == 3
    assert Roster(5).present == range(5)


def test_clients_held_out_are_drawn_by_the_seed_at_least_one() -> None:
    drawn = draw_held_out(0, 20, 0.2)
    assert len(drawn) == 4 and drawn == draw_held_out(0, 20, 0.2) != draw_held_out(1, 20, 0.2)
    assert len(draw_held_out(0, 20, 0.001)) == 1 and draw_held_out(0, 20, 0.0) == frozenset()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["exclude=[6]"], r"exclude=\[6\]: client 6 does not exist; ids go from 0 to 5"),
        (["exclude=[1,1]"], r"exclude=\[1, 1\]: client 1 is listed twice"),
        (["exclude=[0,1,2,3,4,5]"], "of 6 clients nobody is left to train"),
        (["exclude_fill=fill"], "exclude_fill=fill: must be one of substitute, shrink"),
        (["exclude=[1]", "strategy=gossip", "topology=ring"], "type topology=edge_list"),
        (["exclude=[0,1,2,3]", "aggregator=krum", "aggregator.f=1", "clients_per_round=6"], "clients_per_round"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run(*settings)


def test_a_list_of_cohorts_must_not_name_who_is_never_there() -> None:
    with pytest.raises(ConfigError, match=r"cohorts\[1\]: client 2 is never there"):
        classification(cohorts=[[0, 1], [2, 3]]).run("rounds=2", "exclude=[2]")


def test_no_exclusion_is_no_other_run() -> None:
    problem = classification()
    assert hashes(problem.run("exclude=[]", "exclude_fill=shrink")) == hashes(problem.run())


def test_a_strategy_that_asks_who_is_not_there_is_told() -> None:
    from strategies.fedavg import FedAvg

    class Asks(FedAvg):
        def round(self, server: Any, state: Any, round: Any) -> Any:
            server.exchange(self.message(state, round), self.folds, clients=range(6))
            return state

    with pytest.raises(Exception, match=r"asks client 2, which is never there.*ask server.clients"):
        classification(clients=classes()).run(
            "exclude=[2]", strategy=Asks(server_lr=1.0, weighting="samples")
        )
