"""Who is asked: every rule against what it promises, and at what cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from problems import classification, hashes

from fedsim.cohort import sample
from fedsim.payload import Outcome
from fedsim.rng import numpy_rng
from fedsim.sampling import Oort, Population, PowerOfChoice, RoundRobin, Sampler, Staying, Uniform, Weighted
from fedsim.system import Clock, System
from fedsim.system.availability import Availability, Diurnal, Random
from fedsim.system.cost import SAMPLES
from fedsim.system.devices import fleet_of
from fedsim.system.settings import Dropout

OORT: dict[str, float] = {
    "explore": 0.9,
    "decay": 0.98,
    "least": 0.2,
    "penalty": 2,
    "duration": 0.8,
    "clip": 1,
    "cutoff": 0.95,
}
RULES: tuple[Sampler, ...] = (
    Uniform(),
    Weighted(),
    RoundRobin(),
    Staying(choice=2),
    PowerOfChoice(choice=2),
    Oort(**OORT),
)


def population(
    m: int, availability: Availability | None = None, sizes: np.ndarray | None = None
) -> Population:
    availability = availability or Random(p=0.5, every=10)
    dropout = Dropout(before=0, during=0, after=0)
    fixed: dict[str, Any] = {
        "work": "samples",
        "stragglers": "wait",
        "over_selection": 1,
        "check_in": True,
        "idle": 1,
    }
    fleet = fleet_of(m, {"speed": 1, "down": 1, "up": 1})
    system = System(
        devices=lambda m, rng: fleet, availability=availability, dropout=dropout, deadline=None, **fixed
    )
    presence = availability.start(m, 0)
    clock = Clock(system=system, fleet=fleet, presence=presence, cost=SAMPLES, seed=0, memory_mb=0)
    return Population(np.ones(m, dtype=int) if sizes is None else sizes, 0, clock)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("m", [30, 5000])
def test_who_is_asked_is_there_distinct_and_not_excluded(rule: Sampler, m: int) -> None:
    people, exclude = population(m), set(range(0, m, 3))
    for round in range(20):
        ids = rule(people, 6, round, exclude=exclude)
        assert len(ids) == 6 and ids == sorted(set(ids)) and not exclude & set(ids)
        assert people.present(np.array(ids)).all()
        assert ids == rule(people, 6, round, exclude=exclude)
    everyone = rule(people, m, 0)
    assert everyone == np.flatnonzero(people.present(np.arange(m))).tolist()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_the_cost_does_not_grow_with_the_population(rule: Sampler) -> None:
    people = population(1_000_000)
    looked, present = [], people.clock.presence  # type: ignore[union-attr]

    class Count:
        def until(self, ids: np.ndarray, now: float) -> np.ndarray:
            looked.append(len(ids))
            return present.until(ids, now)

    people.clock.presence = Count()  # type: ignore[union-attr]
    for round in range(3):
        assert len(rule(people, 10, round)) == 10
    assert sum(looked) <= 3 * 128


def test_uniform_is_as_it_was_where_everybody_is_there() -> None:
    people = Population(np.ones(50, dtype=int), 3)
    assert Uniform()(people, 7, 4) == sample(3, 4, 50, 7)


def test_uniform_is_uniform_among_those_present() -> None:
    people = population(40)
    count = Counter(c for r in range(3000) for c in Uniform()(people, 3, r))
    there = np.flatnonzero(people.present(np.arange(40))).tolist()
    assert sorted(count) == there
    assert all(abs(n / 3000 - 3 / len(there)) < 0.035 for n in count.values())


def test_weighted_goes_by_samples() -> None:
    sizes = np.array([0, 10, 30, 60])
    people = Population(sizes, 0)
    count = Counter(c for r in range(4000) for c in Weighted()(people, 1, r))
    assert [count[c] / 4000 for c in range(4)] == pytest.approx([0, 0.1, 0.3, 0.6], abs=0.03)
    assert Weighted()(people, 4, 0) == [1, 2, 3]


def test_round_robin_takes_turns() -> None:
    people = Population(np.ones(7, dtype=int), 0)
    assert [RoundRobin()(people, 3, r) for r in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 6]]


def test_staying_prefers_who_stays() -> None:
    people = population(2000, Diurnal(hours=8, start_hour=1, spread=3))
    now = people.clock.now = 6 * 3600.0  # type: ignore[union-attr]
    stay = {
        type(rule): np.mean(
            [people.clock.presence.until(np.array(rule(people, 10, r)), now).mean() for r in range(50)]
        )  # type: ignore[union-attr]
        for rule in (Uniform(), Staying(choice=4))
    }
    assert stay[Staying] > stay[Uniform] + 3600


def seen(losses: list[float], seconds: list[float] | None = None) -> Population:
    people = Population(np.full(len(losses), 10), 0)
    times = seconds or [1.0] * len(losses)
    people.observe(
        0,
        [
            Outcome(c, "ok", metrics={"train_loss": v}, sim_seconds=t)
            for c, (v, t) in enumerate(zip(losses, times, strict=True))
        ],
    )
    return people


def test_power_of_choice_takes_the_highest_loss_and_tries_everybody_once() -> None:
    people = seen([1.0, 5.0, 2.0, 4.0, 3.0])
    assert PowerOfChoice(choice=5 / 2)(people, 2, 1) == [1, 3]
    people.seen.pop(0)
    assert PowerOfChoice(choice=5 / 2)(people, 2, 1) == [0, 1]


def test_oort_exploits_high_loss_in_time_and_explores() -> None:
    rule = Oort(**{**OORT, "explore": 0.0, "least": 0.0})
    people = seen([1.0] * 90 + [9.0] * 10)
    picked = Counter(c for r in range(50) for c in rule(people, 5, r))
    assert set(picked) <= set(range(90, 100))
    slow = seen([1.0] * 90 + [9.0] * 10, [1.0] * 90 + [9.0] * 10)  # beyond the 80 % quantile: 9 / 81 of 9
    picked = Counter(c for r in range(50) for c in rule(slow, 5, r))
    assert not set(picked) & set(range(90, 100))
    rule = Oort(**{**OORT, "explore": 0.5, "decay": 1.0})
    people.sizes = np.full(1000, 10)
    fresh = np.mean([np.mean([c >= 100 for c in rule(people, 10, r)]) for r in range(100)])
    assert fresh == pytest.approx(0.5, abs=0.06)


def test_what_was_seen_survives_a_checkpoint() -> None:
    people = seen([1.0, 2.0], [3.0, 4.0])
    again = Population(people.sizes, 0)
    again.restore(people.save())
    assert again.seen == people.seen == {0: (1.0, 3.0, 0.0), 1: (2.0, 4.0, 0.0)}


@pytest.mark.parametrize("rule", ["weighted", "round_robin", "staying", "power_of_choice", "oort"])
def test_every_rule_can_be_chosen(rule: str) -> None:
    result = classification().run(f"sampling={rule}", "system=lognormal", "strategy.weighting=uniform")
    assert len(set(hashes(result))) == 4
    assert all(len(row["cohort"]) == 3 for row in result.rows)


def test_draws_of_the_rules_are_keyed() -> None:
    assert numpy_rng(0, "cohort", 1).random() != numpy_rng(0, "cohort", 1, 0).random()
