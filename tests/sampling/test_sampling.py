"""Who is asked: every rule against what it promises, and at what cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes, network
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome
from fedsim.rng import numpy_rng
from fedsim.sampling import Oort, Population, PowerOfChoice, RoundRobin, Sampler, Staying, Uniform, Weighted
from fedsim.sampling.cohort import sample
from fedsim.system import Clock, System
from fedsim.system.availability import Availability, Diurnal, Random
from fedsim.system.battery import Battery
from fedsim.system.cost import SAMPLES
from fedsim.system.devices import fleet_of
from fedsim.system.system import Dropout

OORT: dict[str, Any] = {
    "explore": 0.9,
    "decay": 0.98,
    "least": 0.2,
    "penalty": 2,
    "preferred": None,
    "duration": 0.8,
    "pace": 0.05,
    "window": 2,
    "clip": 1,
    "cutoff": 0.95,
    "most": None,
    "choice": 4,
    "loss": "samples",
}
RULES: tuple[Sampler, ...] = (
    Uniform(),
    Weighted(),
    RoundRobin(),
    Staying(choice=2),
    PowerOfChoice(choice=2, loss="last"),
    Oort(**{**OORT, "choice": 2}),
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
        "battery": Battery(threshold=0.2, charge_watts=5),
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
    rule = PowerOfChoice(choice=5 / 2, loss="last")
    assert rule(people, 2, 1) == [1, 3]
    people.seen.pop(0)
    assert rule(people, 2, 1) == [0, 1]


def losses_of(weights: Any, clients: list[Any]) -> np.ndarray:
    """(m, 2): mean and root mean square loss over each client's samples, with plain torch."""
    model = network()
    if weights is not None:
        model.load_state_dict(weights)
    out = []
    with torch.no_grad():
        for x, y in clients:
            loss = F.cross_entropy(model(x), y, reduction="none").double()
            out.append([float(loss.mean()), float(loss.square().mean().sqrt())])
    return np.array(out)


def test_power_of_choice_measures_its_candidates_on_the_current_model(fleet: str) -> None:
    """All six are candidates for two places: the two of highest loss, at the price of asking all six."""
    problem, clients = classification(), classes()
    settings = ["sampling=power_of_choice", "clients_per_round=2", "strategy.weighting=uniform"]
    settings += ["system=table", fleet]
    weights = [None, *(problem.run(*settings, f"rounds={n}").weights for n in (1, 2))]
    result = problem.run(*settings, "rounds=3")
    for row, before in zip(result.rows, weights, strict=True):
        highest = np.argsort(-losses_of(before, clients)[:, 0])[:2]
        assert row["cohort"] == sorted(highest.tolist())
        assert row["bytes_down"] == (6 + 2) * 172 and row["bytes_up"] == 6 * 24 + 2 * 180
    told = result.per_client.query("metric == 'losses/loss' and round == 1").sort_values("client").value
    np.testing.assert_allclose(told, losses_of(None, clients)[:, 0], rtol=1e-6)
    # Client 2 passes its 3 samples forward at 1 sample/s; a forward pass is a third; then the two train.
    asking = 0.1 + 0.172 + 3 / 3 / 1 + 0.1 + 24 / 500
    chosen, sizes = result.rows[0]["cohort"], (7, 12, 3, 10, 6, 11)
    training = 0.1 + 0.172 + max(2 * sizes[c] / (1 if c == 2 else 10) for c in chosen) + 0.1 + 180 / 500
    assert result.rows[0]["sim_seconds"] == pytest.approx(asking + training)


def test_power_of_choice_leaves_out_who_does_not_answer() -> None:
    lost = ["system=lognormal", "system.dropout.before=0.5", "sampling=power_of_choice", "rounds=6"]
    result = classification().run(*lost, "clients_per_round=2")
    for row in result.rows:
        silent = {f["client"] for f in row["failures"] if f["task"] == "losses"}
        assert silent and not silent & set(row["cohort"])
    with pytest.raises(ConfigError, match=r"choose sampling.loss=last"):
        classification().run("strategy=fedbuff", "system=lognormal", "sampling=power_of_choice")


def test_oorts_loss_is_the_root_mean_square_over_samples_and_costs_nothing() -> None:
    result = classification().run("sampling=oort", "rounds=1", "clients_per_round=6", "system=lognormal")
    told = result.per_client.query("metric == 'utility/loss_rms'").sort_values("client").value
    np.testing.assert_allclose(told, losses_of(None, classes())[:, 1], rtol=1e-6)
    plain = classification().run("rounds=1", "clients_per_round=6", "system=lognormal")
    for key in ("weights_hash", "bytes_up", "bytes_down", "sim_seconds"):
        assert result.rows[0][key] == plain.rows[0][key]
    cheap = classification().run("sampling=oort", "sampling.loss=steps", "rounds=1")
    assert not (cheap.per_client.metric == "utility/loss_rms").any()


def test_oorts_utility_by_hand() -> None:
    """Ten samples each, losses 4 3 2 1, durations 1 8 1 1 s, last answers in rounds 1, 1, 1 and 4; R = 5, T = 4."""
    rule = Oort(**{**OORT, "explore": 0.0, "least": 0.0, "cutoff": 1.0, "preferred": 4.0})
    people = seen([4.0, 3.0, 2.0, 1.0], [1.0, 8.0, 1.0, 1.0])
    people.seen[3] = people.seen[3]._replace(round=3.0)
    old, recent = np.sqrt(0.1 * np.log(5) / 1), np.sqrt(0.1 * np.log(5) / 4)
    utility = [1 + old, (2 / 3 + old) * (4 / 8) ** 2, 1 / 3 + old, 0 + recent]  # 1.40 0.27 0.73 0.20
    order = np.argsort(-np.array(utility)).tolist()
    assert order == [0, 2, 1, 3]
    for count in (1, 2, 3):  # with the cutoff at 1 nobody else is let in
        assert rule(people, count, 4) == sorted(order[:count])
    people.seen[0] = people.seen[0]._replace(times=3.0)
    worn = Oort(**{**OORT, "explore": 0.0, "least": 0.0, "cutoff": 1.0, "preferred": 4.0, "most": 2})
    assert worn(people, 3, 4) == [1, 2, 3] and worn(people, 4, 4) == [0, 1, 2, 3]


def test_the_pacer_relaxes_the_duration_when_less_is_achieved() -> None:
    seconds = np.arange(101.0)
    by_quantile, by_seconds = Oort(**OORT), Oort(**{**OORT, "preferred": 7.0})
    for achieved, steps in (
        ([], 0),
        ([5, 5, 4], 0),
        ([5, 5, 4, 5], 1),
        ([5, 5, 5, 5], 0),
        ([9, 1, 4, 5, 1, 1], 2),
    ):
        found = [float(a) for a in achieved]
        assert by_quantile.limit(seconds, found) == pytest.approx(min(80 + 5 * steps, 100))
        assert by_seconds.limit(seconds, found) == 7 * (1 + steps)


def test_oort_explores_the_fast() -> None:
    people = population(400, Random(p=1, every=10))
    people.clock.fleet.speed[:] = np.where(np.arange(400) < 200, 9.0, 1.0)  # type: ignore[union-attr]
    rule = Oort(**{**OORT, "explore": 1.0, "decay": 1.0, "choice": 8})
    picked = np.concatenate([rule(people, 5, r) for r in range(200)])
    assert np.mean(picked < 200) == pytest.approx(0.9, abs=0.03)
    blind = Population(np.ones(400, dtype=int), 0)
    assert len(rule(blind, 5, 0)) == 5


def test_oort_exploits_high_loss_in_time_and_explores() -> None:
    rule = Oort(**{**OORT, "explore": 0.0, "least": 0.0})
    people = seen([1.0] * 90 + [9.0] * 10)
    picked = Counter(c for r in range(50) for c in rule(people, 5, r))
    assert set(picked) <= set(range(90, 100))
    slow = seen([1.0] * 90 + [9.0] * 10, [1.0] * 90 + [9.0] * 10)  # beyond the 80 % quantile: 9 / 81 of 9
    picked = Counter(c for r in range(1, 51) for c in rule(slow, 5, r))
    assert not set(picked) & set(range(90, 100))
    rule = Oort(**{**OORT, "explore": 0.5, "decay": 1.0})
    people.sizes = np.full(1000, 10)
    fresh = np.mean([np.mean([c >= 100 for c in rule(people, 10, r)]) for r in range(100)])
    assert fresh == pytest.approx(0.5, abs=0.06)


def test_what_was_seen_survives_a_checkpoint() -> None:
    people = seen([1.0, 2.0], [3.0, 4.0])
    again = Population(people.sizes, 0)
    again.restore(people.save())
    assert again.seen == people.seen == {0: (1.0, 3.0, 0.0, 1.0), 1: (2.0, 4.0, 0.0, 1.0)}
    assert again.achieved == people.achieved == [30.0]


@pytest.mark.parametrize("rule", ["weighted", "round_robin", "staying", "power_of_choice", "oort"])
def test_every_rule_can_be_chosen(rule: str) -> None:
    result = classification().run(f"sampling={rule}", "system=lognormal", "strategy.weighting=uniform")
    assert len(set(hashes(result))) == 4
    assert all(len(row["cohort"]) == 3 for row in result.rows)


def test_draws_of_the_rules_are_keyed() -> None:
    assert numpy_rng(0, "cohort", 1).random() != numpy_rng(0, "cohort", 1, 0).random()
