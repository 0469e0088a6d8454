"""Every strategy with clients that fail, are absent, are nobody, or are all the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import Fail, hooked
from problems import NaNAbove, Pair, Problem, Recorded, classes, classification, hashes, method, network
from registry import Entry
from trial import each_method, each_strategy, record, run_hooked, spread_cohorts

from fedsim.errors import ClientError

# -- who takes part -----------------------------------------------------------------------------------------------


@spread_cohorts
def test_a_failing_client_is_skipped_as_if_it_had_not_been_asked(entry: Entry) -> None:
    cohorts = [[0, 2, 3], [1, 2, 5], [2, 4, 5], [0, 1, 2]]
    skip = "failures.policy=skip"
    strategy, result = run_hooked(entry, Fail([2]), classification(cohorts=cohorts), skip, "engine.chunks=3")
    without = [[c for c in ids if c != 2] for ids in cohorts]
    _, expected = record(entry, classification(cohorts=without), "engine.chunks=2")
    assert hashes(result) == hashes(expected)
    assert not strategy.kept[-1][2]
    told = [
        (f["client"], f["kind"], "has had enough" in f["reason"]) for r in result.rows for f in r["failures"]
    ]
    assert told == [(2, "failed", True)] * (1 if entry.once else 4)


@spread_cohorts
def test_a_failing_client_stops_the_run_by_default_and_is_named(entry: Entry) -> None:
    cohorts = [[0, 1], [2, 3], [4, 5], [0, 5]]
    cohorts, at = (cohorts[2:], 1) if entry.once else (cohorts, 3)
    given = (f"rounds={len(cohorts)}",)
    said = rf"client 4 failed in round {at}(?s:.*)Traceback(?s:.*)has had enough"
    with pytest.raises(ClientError, match=said):
        run_hooked(entry, Fail([4]), classification(cohorts=cohorts), *given)


@each_method
def test_an_empty_cohort_changes_nothing(entry: Entry) -> None:
    if entry.trains_alone:
        pytest.skip("the server goes on alone: tests/strategies/test_semisupervised.py")
    strategy, result = record(entry, classification(cohorts=[[0, 1], [], [], [2, 3]]))
    first, second, third, last = hashes(result)
    assert first == second == third != last
    for name, value in strategy.states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, strategy.states[2][name])
    assert result.rows[1]["bytes_up"] == result.rows[1]["bytes_down"] == 0


@each_method
def test_if_nobody_answers_nothing_changes(entry: Entry) -> None:
    if entry.trains_alone:
        pytest.skip("the server goes on alone: tests/strategies/test_semisupervised.py")
    fail = Fail(range(6), rounds=[1])
    strategy, result = run_hooked(entry, fail, classification(), "failures.policy=skip")
    first, second, third, _ = hashes(result)
    assert first == second != third
    for name, value in strategy.states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, strategy.states[1][name])
    assert len(result.rows[1]["failures"]) == 3
    for before, after in zip(strategy.kept[0], strategy.kept[1], strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


@each_strategy
def test_absent_clients_keep_their_state_bit_for_bit(entry: Entry) -> None:
    if entry.parts or entry.strategy == "fedkseed":
        pytest.skip("nothing is kept where there is no BatchNorm, or where all follows from one sum")
    strategy, result = record(entry, classification("bn"), "buffers=all_local", "rounds=6")
    for t in range(1, 6):
        for client in range(6):
            before, after = strategy.kept[t - 1][client], strategy.kept[t][client]
            if client in result.rows[t]["cohort"]:
                assert after
                assert any(k not in before or not torch.equal(before[k], v) for k, v in after.items())
            else:
                assert before.keys() == after.keys()
                assert all(torch.equal(before[k], v) for k, v in after.items())


@each_strategy
def test_a_nonfinite_client_is_named_and_left_out(entry: Entry) -> None:
    if entry.adds_samples:
        pytest.skip(
            "rows of all clients are drawn from the statistics of all: tests/strategies/test_ggeur_edges.py"
        )
    if entry.trains_alone:
        pytest.skip("a client of whose samples nobody knows anything has no pseudo labels, and refuses")
    if entry.still:
        pytest.skip(
            "slopes that are not finite count as 0, named in the row: tests/strategies/test_one_byte.py"
        )
    clients = classes()
    clients[3] = (torch.full_like(clients[3][0], 1e7), clients[3][1])
    cohorts = [[0, 3], [1, 2], [3, 4], [3, 5]]
    problem = classification(clients=clients, cohorts=cohorts, model=network("tanh", 4, 3, NaNAbove()))
    strategy, result = record(entry, problem)
    named = [(r["round"], f["client"], f["kind"]) for r in result.rows for f in r["failures"]]
    assert named == [(t, 3, "nonfinite") for t in ((1,) if entry.once else (1, 3, 4))]
    assert not strategy.kept[-1][3]
    assert all(torch.isfinite(v).all() for v in result.weights.values())
    with pytest.raises(ClientError, match=r"client 3 nonfinite in round 1.*(delta|gram|row 0|loss)"):
        record(entry, problem, "failures.nonfinite=stop")


def identical(count: int) -> list[Pair]:
    return classes((8,)) * count


@each_strategy
def test_identical_clients_are_one_client(entry: Entry) -> None:
    """Full batches, everybody present: the model goes where a single client's would."""
    if entry.draws or entry.adds_samples or entry.semi:
        pytest.skip("each client draws noise of its own, or which of its samples have labels")
    if entry.clusters:
        pytest.skip("more clusters than one client: tests/strategies/test_clusters.py")
    if entry.has("attack") or entry.parts:
        pytest.skip("attackers are not like the others, nor are clients of other widths")
    settings = [*entry.arguments, "dtype=float64", "client.batch_size=8", "client.epochs=3"]
    one = Problem(network(), identical(1), ("rounds=3", "clients_per_round=1")).run(*settings)
    five = Problem(network(), identical(5), ("rounds=3", "clients_per_round=5")).run(*settings)
    for name, value in one.weights.items():
        torch.testing.assert_close(five.weights[name], value, rtol=0, atol=1e-13)


# -- FedAvg's own -------------------------------------------------------------------------------------------------


def test_a_retry_that_works_is_in_the_log(tmp_path: Path) -> None:
    fail = Fail([2], marker=tmp_path / "marker")
    strategy = hooked("fedavg", fail)
    result = classification(cohorts=[[1, 2]] * 2).run("rounds=2", "failures.retries=1", strategy=strategy)
    retries = result.per_client.query("metric == 'retries'")
    assert retries[["round", "client", "value"]].values.tolist() == [[1, 2, 1.0]]


def test_a_client_whose_state_alone_is_not_finite_is_left_out() -> None:
    @dataclass(frozen=True)
    class Broken:
        inner: Any

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def fit(self, job: Any) -> Any:
            update = self.inner.fit(job)
            return (
                replace(update, state={"h": update.state["h"] * float("nan")}) if job.client == 2 else update
            )

    inner = method("fedspeed")
    inner.client = Broken(inner.client)
    strategy = Recorded(inner)
    result = classification(cohorts=[[1, 2]]).run("rounds=1", strategy=strategy)
    assert [(f["client"], f["kind"]) for f in result.rows[0]["failures"]] == [(2, "nonfinite")]
    assert "its state 'h'" in result.rows[0]["failures"][0]["reason"]
    assert not strategy.kept[0][2] and strategy.kept[0][1]
