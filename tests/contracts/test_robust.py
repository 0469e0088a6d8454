"""Robust rules under every strategy: each vector that clients send passes the rule, and nothing else is believed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import compose_quickly
from problems import (
    Problem,
    Recorded,
    classes,
    classification,
    hashes,
    method,
    network,
)
from registry import TABLE, Entry

from clients.attacks import Attack, Attacked
from fedsim.errors import ConfigError
from fedsim.exchange.fold import fold_kinds
from fedsim.exchange.payload import Outcome, Replies
from fedsim.run import participants
from strategies import aggregators
from strategies.aggregators import coordinate_median, mean, norm_clip

SUMMED = {  # by strategy, what is added up as it comes: docs/fidelity.md says why
    "FedProto": {"features", "n"},
    "FRAug": {"generator_buffers"},
    "FedMatch": {"embedding"},
    "FedoSSL": {"centroids", "rows", "means", "present"},
}
VECTORS = {  # strategies that average more than the model's update, and what
    "scaffold": ("scaffold", "c", ()),
    "fedspeed": ("fedspeed", "delta", ()),
    "fedspeed-active": ("fedspeed", "h", ("strategy.dual_mean=active",)),
    "fedspeed-relaxed": ("fedspeed", "moved", ("strategy.beta=0.2", "strategy.weighting=samples")),
    "feddyn": ("feddyn", "delta", ("strategy.weighting=samples",)),
    "fraug": ("fraug", "generator", ("strategy.rounds=6",)),
    "ggeur-scaffold": ("ggeur", "c", ("strategy.target=6", "strategy@strategy.base=scaffold")),
}
each_vector = pytest.mark.parametrize("label", VECTORS)


def average(updates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean under another name, so that single vectors are asked for."""
    return mean(updates, weights)


def run(label: str, *settings: str, aggregator: Any = mean, hostile: Attack | None = None) -> Recorded:
    """Two rounds with all six clients; clients 1 and 4 attack."""
    name, _, overrides = VECTORS[label]
    strategy = method(name, *overrides)
    strategy.aggregator = aggregator
    base = strategy.base if name == "ggeur" else strategy
    base.aggregator = aggregator
    if hostile is not None:
        base.client = Attacked(base.client, hostile, frozenset({1, 4}))
        if name == "ggeur":
            strategy.__post_init__()
    kept = Recorded(strategy)
    problem = classification(cohorts=[range(6)] * 2)
    problem.run(f"strategy={name}", "rounds=2", "dtype=float64", *settings, strategy=kept)
    return kept


# -- what is asked of the workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e.label)
def test_under_a_rule_no_vector_is_summed_up_before_it(entry: Entry) -> None:
    config = compose_quickly(entry.arguments)
    built = participants.strategy(config, None)
    if built.traits.peers:
        pytest.skip("peers have no server to rule")
    if built.traits.client_by_client:
        pytest.skip("refuses a rule: what it sums is made of slopes that no rule compares")
    strategy = getattr(built, "base", built)
    strategy.aggregator = coordinate_median
    believed = SUMMED.get(type(strategy).__name__, set())
    assert strategy.statistics <= believed
    assert set(strategy.folds) == set(strategy.fold)
    for name, kinds in fold_kinds(strategy.folds).items():
        assert kinds == ("stack",) or name in believed


@each_vector
def test_the_mean_by_another_name_changes_nothing_beyond_rounding(label: str) -> None:
    plain, ruled = run(label), run(label, aggregator=average)
    for name, value in plain.states[-1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ruled.states[-1][name], value, rtol=0, atol=1e-11)


# -- what the rule gives ----------------------------------------------------------------------------------------------


def replies(**stacks: np.ndarray) -> Replies:
    """What three clients of weights 1, 2, 5 sent."""
    ok = [Outcome(c, "ok", weight=w) for c, w in ((2, 1.0), (3, 2.0), (7, 5.0))]
    return Replies(ok, {(name, "stack"): torch.tensor(rows) for name, rows in stacks.items()})


@dataclass
class TheRound:
    num_clients: int = 12


ROWS = np.array([[1.0, 0.0], [3.0, 4.0], [1e9, -1e9]])


def test_scaffold_moves_its_control_variate_by_the_rule() -> None:
    strategy = method("scaffold", "strategy.server_lr=0.5")
    strategy.aggregator = coordinate_median
    state = {"w": torch.ones(2, dtype=torch.float64), "c": torch.ones(2, dtype=torch.float64)}
    new = strategy.update(state, replies(delta=ROWS, c=ROWS[::-1] * [1.0, -1.0]), TheRound())
    assert new["w"].tolist() == [1 + 0.5 * 3, 1 + 0.5 * 0]
    assert new["c"].tolist() == [1 + 3 / 12 * 3, 1 + 3 / 12 * 0]


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_the_mean_dual_moves_by_the_rule_with_equal_weights(weighting: str) -> None:
    strategy = method("feddyn", f"strategy.weighting={weighting}")
    strategy.aggregator = norm_clip  # weighs, unlike most rules; the median norm is 5
    state = {"w": torch.zeros(2, dtype=torch.float64), "hbar": torch.zeros(2, dtype=torch.float64)}
    new = strategy.update(state, replies(delta=ROWS), TheRound())
    clipped = np.array([[1.0, 0.0], [3.0, 4.0], [5 / np.sqrt(2), -5 / np.sqrt(2)]])
    hbar = 3 / 12 * clipped.mean(0)
    np.testing.assert_allclose(new["hbar"], hbar, atol=1e-14)
    np.testing.assert_allclose(new["w"], np.array([1, 2, 5]) @ clipped / 8 + hbar, atol=1e-14)


def test_reports_of_all_vectors_are_in_the_log_by_client() -> None:
    strategy, sent = method("scaffold"), replies(delta=ROWS, c=ROWS[::-1].copy())
    strategy.aggregator = aggregators.krum
    with pytest.raises(TypeError, match="f"):
        strategy.update({"w": torch.zeros(2), "c": torch.zeros(2)}, sent, TheRound())
    result = classification(cohorts=[[0, 1, 2, 4, 5]]).run(
        "strategy=scaffold", "aggregator=multi_krum", "aggregator.f=1", "rounds=1"
    )
    row = json.loads((Path(result.dir) / "metrics.jsonl").read_text())["aggregator"]
    assert row["clients"] == [0, 1, 2, 4, 5] and row["dropped"] == row["c"]["dropped"] == []
    for told in (row, row["c"]):
        assert len(told["selected"]) == 2 and set(told["selected"]) <= set(row["clients"])


# -- attacks on one vector --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Poison(Attack):
    """Ten million in every entry of one array; all others are honest."""

    name: str

    def corrupt(self, job: Any, name: str, array: torch.Tensor) -> torch.Tensor:
        return torch.full_like(array, 1e7) if name == self.name else array


def size(kept: Recorded) -> float:
    """The largest entry of the last state, statistics of GGEUR's phase 0 aside."""
    arrays = {k: v for k, v in kept.states[-1].items() if isinstance(v, torch.Tensor) and v.numel()}
    return max(float(v.abs().max()) for k, v in arrays.items() if not k.startswith("ggeur/"))


@cache
def calm(label: str) -> float:
    return size(run(label))


@each_vector
def test_poison_in_any_one_vector_ruins_the_mean_but_not_a_rule(label: str) -> None:
    poison = Poison(fraction=0.3, name=VECTORS[label][1])
    assert size(run(label, hostile=poison)) > 1e5
    assert size(run(label, aggregator=coordinate_median, hostile=poison)) < 2 * max(calm(label), 1)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [("strategy=local_only",), ("strategy=fedproto", "strategy.share=prototypes")]
)
def test_a_rule_over_nothing_is_refused(settings: tuple[str, ...]) -> None:
    problem = Problem(network(), classes(), ("clients_per_round=3", "rounds=1"))
    with pytest.raises(ConfigError, match=r"aggregator: \w+ averages no vectors here; leave aggregator out"):
        problem.run(*settings, "aggregator=flag")


def test_one_answer_at_a_time_leaves_nothing_to_a_rule() -> None:
    with pytest.raises(ConfigError, match="aggregator: strategy=fedasync hears one client at a time"):
        classification().run("strategy=fedasync", "system=lognormal", "aggregator=flag")


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "fedspeed"])
def test_a_scale_that_forgets_the_size_serves_the_update_alone(strategy: str) -> None:
    unit = ("aggregator=flag", "aggregator.scale=unit")
    with pytest.raises(ConfigError, match=r"aggregator.scale=unit: forgets how long updates are"):
        classification().run(f"strategy={strategy}", *unit, "rounds=1")
    assert hashes(classification().run("strategy=fedavg", *unit, "rounds=1"))
