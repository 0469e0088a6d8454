"""``fedsim.simulate``: what it takes in Python and what it gives back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Recorded, classes, classification, hashes, method, network, quadratic
from torch import nn

import fedsim
from fedsim.errors import ConfigError
from fedsim.task.vectors import FlatModel
from strategies.aggregators import mean
from strategies.base import Strategy
from strategies.fedavg import FedAvg


def test_result_holds_weights_history_clients_summary_and_folder() -> None:
    result = classification().run("evaluation.every=2", "name=mine")
    assert set(result.weights) == set(network().state_dict())
    assert result.dir.parent == Path("runs/mine")
    history = result.history
    assert history["round"].tolist() == [1, 2, 3, 4]
    assert history.accuracy.isna().tolist() == [True, False, True, False]
    assert [len(c) for c in history.cohort] == [3] * 4
    table = result.per_client
    assert list(table.columns) == ["round", "client", "metric", "value"]
    first = table[table["round"] == 1]
    assert sorted(first.client.unique()) == history.cohort[0]
    weight = first[first.metric == "weight"].set_index("client").value.to_dict()
    assert weight == {c: float((7, 12, 3, 10, 6, 11)[c]) for c in history.cohort[0]}
    assert result.summary["weights_hash"] == history.weights_hash[3]
    assert result.summary["accuracy"] == history.accuracy[3]
    assert result.summary["status"] == "done"
    assert json.loads((result.dir / "summary.json").read_text())["rounds"] == 4


def test_reported_accuracy_is_that_of_the_returned_weights() -> None:
    problem = classification("bn")
    result = problem.run()
    model = network("bn")
    model.load_state_dict(result.weights)
    x, y = problem.test  # type: ignore[misc]
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).double().mean()
    assert result.summary["accuracy"] == pytest.approx(float(right))


def test_plot_shows_the_curves() -> None:
    figure = classification().run("evaluation.every=1").plot()
    lines = [line for axes in figure.axes for line in axes.get_lines() if len(line.get_xdata()) == 4]
    assert lines
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]


def test_training_loss_is_the_mean_over_steps_weighted_by_samples() -> None:
    result = classification().run("rounds=1")
    table = result.per_client.pivot(index="client", columns="metric", values="value")
    expected = (table.train_loss * table.samples).sum() / table.samples.sum()
    assert result.rows[0]["train_loss"] == pytest.approx(expected)


def test_initial_weights_are_where_the_run_starts() -> None:
    start = {k: torch.full_like(v, 0.25) for k, v in network().state_dict().items()}
    result = classification(cohorts=[[], []]).run("rounds=2", initial=start)
    assert all(torch.equal(result.weights[k], v) for k, v in start.items())
    with pytest.raises(ConfigError, match=r"initial: '0\.bias' is missing"):
        classification().run(initial={k: v for k, v in start.items() if k != "0.bias"})


def frozen_first_layer() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


def test_initial_weights_reach_frozen_parameters_and_statistics_too() -> None:
    model = frozen_first_layer()
    start = {k: torch.full_like(v, 0.25) for k, v in model.state_dict().items()}
    problem = classification(model=model)
    result = problem.run(initial=start)
    assert (result.weights["0.weight"] == 0.25).all()
    moved = frozen_first_layer()
    moved.load_state_dict(start)
    assert hashes(problem.run(model=moved)) == hashes(result)
    assert not (model[0].weight == 0.25).any()  # the caller's module is left alone

    bn = {k: v.clone() for k, v in network("bn").state_dict().items()}
    bn["1.running_mean"] += 3
    kept = classification("bn", cohorts=[[]]).run("rounds=1", initial=bn)
    assert kept.weights["1.running_mean"].tolist() == [3] * 5


def test_unknown_initial_weights_are_refused_by_name() -> None:
    start = {**network().state_dict(), "3.wieght": torch.zeros(2)}
    with pytest.raises(ConfigError, match=r"initial.*3\.wieght"):
        classification().run(initial=start)


def test_the_callers_model_is_left_alone() -> None:
    model = network("bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classification("bn", model=model).run("dtype=float64")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].weight.dtype == torch.float32


def test_a_factory_is_called_under_the_runs_seed() -> None:
    def factory() -> nn.Module:
        return nn.Linear(4, 3)

    problem = classification(model=factory, cohorts=[[]] * 4)
    weights = [problem.run(f"seed={s}").weights["weight"] for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_numpy_clients_are_the_same_clients() -> None:
    arrays = [(x.numpy(), y.numpy()) for x, y in classes()]
    assert hashes(classification(clients=arrays).run()) == hashes(classification().run())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"clients": []}, "clients: the list is empty"),
        ({"clients": [(torch.zeros(2, 4), torch.zeros(3))] * 6}, r"clients\[0\]: x has 2 samples, y has 3"),
        (
            {"clients": [(torch.zeros(2, 4), torch.zeros(2)), (torch.zeros(2, 5), torch.zeros(2))] * 3},
            r"clients\[1\]: samples of shape \(5,\)",
        ),
        ({"clients": None}, "test: give it together with clients"),
        ({"cohorts": [[0]]}, "1 rounds given, but rounds=4"),
        ({"strategy": object()}, "object has no 'init'"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_starts(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        classification().run(**given)


class Listener:
    """Only the hooks it cares for."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.ended: dict[str, Any] = {}

    def round(self, row: dict[str, Any], clients: list[dict[str, Any]]) -> None:
        self.rounds.append(row["round"])
        assert {r["client"] for r in clients} == set(row["cohort"])

    def end(self, summary: dict[str, Any]) -> None:
        self.ended = summary


def test_callbacks_hear_every_round_and_the_end() -> None:
    listener = Listener()
    result = classification().run(callbacks=[listener])
    assert listener.rounds == [1, 2, 3, 4]
    assert listener.ended["weights_hash"] == result.summary["weights_hash"]


def first_update(updates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """No rule to recommend: the first client's update."""
    return updates[0]


class WithItsOwn(FedAvg):
    """Brings an aggregator."""

    aggregator = staticmethod(first_update)


class Heir(WithItsOwn):
    """Inherits one."""


@pytest.mark.parametrize("kind", [WithItsOwn, Heir])
def test_a_strategy_keeps_the_aggregator_of_its_class(kind: type[FedAvg]) -> None:
    given = {"strategy": kind(server_lr=1.0, weighting="samples")}
    alone = classification(cohorts=[[1], [2], [0], [3]]).run("dtype=float64")
    many = classification(cohorts=[[1, 4], [2, 5], [0, 4, 5], [3, 5]]).run("dtype=float64", **given)
    for name, value in alone.weights.items():
        torch.testing.assert_close(many.weights[name], value, rtol=0, atol=1e-14)


def test_a_strategy_object_is_not_changed_by_a_run() -> None:
    strategy = method("fedavg")
    before = dict(vars(strategy))
    classification().run(strategy=strategy)
    assert vars(strategy) == before
    assert Strategy.aggregator is mean


def test_a_stacking_aggregator_gets_every_update_in_client_order() -> None:
    seen: list[tuple[tuple[int, ...], list[float]]] = []

    def spy(updates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        assert weights is not None
        seen.append((tuple(updates.shape), weights.tolist()))
        return mean(updates, weights)

    strategy = method("fedavg")
    strategy.aggregator = spy
    recorded_run = Recorded(strategy)
    result = classification(cohorts=[[5, 0, 2]] * 2).run("rounds=2", "dtype=float64", strategy=recorded_run)
    dim = FlatModel(network(), torch.float64).layout.dim  # with padding, which is zero
    assert seen == [((3, dim), [7.0, 3.0, 11.0])] * 2
    plain = classification(cohorts=[[0, 2, 5]] * 2).run("rounds=2", "dtype=float64")
    for name, value in plain.weights.items():
        torch.testing.assert_close(result.weights[name], value, rtol=0, atol=1e-14)


def test_quadratic_in_memory_runs_without_labels_or_test_set() -> None:
    result = quadratic().run("strategy=fedavg", "evaluation.every=1")
    assert "accuracy" not in result.history
    assert np.isfinite(result.history.train_loss).all()


@pytest.mark.parametrize("settings", ["rounds=2 engine=serial", {"rounds": 2}, [("rounds", 2)]])
def test_settings_that_are_no_list_of_texts_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="settings are a list of texts"):
        fedsim.simulate(settings)


def test_a_method_by_its_name_is_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"it is a setting: simulate\(\[\"strategy=fedprox\"\]\)"):
        fedsim.simulate(["engine=serial"], strategy="fedprox")


@pytest.mark.parametrize("settings", [(), ("clients_per_round=2",), ("clients_per_round=4",)])
def test_cohorts_of_a_few_clients_are_all_of_them_unless_typed(settings: tuple[str, ...]) -> None:
    clients = classes((5, 5, 5))
    wanted = ["engine=serial", "tracker=quiet", "rounds=1", "client.epochs=1", *settings]
    if settings == ("clients_per_round=4",):
        with pytest.raises(
            ConfigError, match=r"clients_per_round=4: must be between 1 and num_clients \(3\)"
        ):
            fedsim.simulate(wanted, model=network(), clients=clients)
        return
    (row,) = fedsim.simulate(wanted, model=network(), clients=clients).rows
    assert len(row["cohort"]) == (2 if settings else 3)
