"""What every strategy's messages and updates hold: statistics of BatchNorm, types, single updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Pair, Problem, classes, classification, network, quadratic
from registry import Entry
from torch import Tensor
from trial import each_method, in_ways, record, run_hooked, spread_cohorts

from fedsim.config.compose import compose
from fedsim.errors import ClientError
from fedsim.exchange.fold import fold_kinds
from fedsim.run import participants
from fedsim.task.layout import Layout

# -- BatchNorm ----------------------------------------------------------------------------------------------------


def first_statistics(pair: Pair, order: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance after one batch through the first layer: 0.9 * (0, 1) + 0.1 * batch (unbiased)."""
    linear = network("bn").double()[0]
    z = linear(pair[0].double()[order]).detach()
    return 0.1 * z.mean(0), 0.9 + 0.1 * z.var(0)


@each_method
def test_averaged_statistics_are_the_weighted_mean_and_counters_stay(entry: Entry) -> None:
    """One step a client on all its samples; the second look of a perturbed gradient must not count."""
    if entry.adds_samples or entry.parts or entry.clusters or entry.semi or entry.two_views or entry.still:
        pytest.skip("the numbers below are for BatchNorm of the clients' own samples alone, in one model")
    clients = classes((4, 8, 12))
    problem = Problem(network("bn"), clients, ("rounds=1", "clients_per_round=3", "dtype=float64"))
    strategy, result = record(entry, problem, "client.epochs=1", "client.batch_size=12")
    table = result.per_client
    weights = table[table.metric == "weight"].sort_values("client").value.to_numpy()
    assert entry.weighs or weights.tolist() in ([4.0, 8.0, 12.0], [1.0, 1.0, 1.0])
    statistics = [first_statistics(pair, torch.arange(len(pair[1]))) for pair in clients]
    for i, name in enumerate(("1.running_mean", "1.running_var")):
        expected = sum(w * s[i] for w, s in zip(weights, statistics, strict=True)) / weights.sum()
        torch.testing.assert_close(result.weights[name], expected, rtol=0, atol=1e-12)
    assert int(result.weights["1.num_batches_tracked"]) == 0
    assert all(v.is_floating_point() for v in strategy.states[0].values() if isinstance(v, Tensor))


@pytest.mark.parametrize("policy", ["local", "all_local"])
@each_method
def test_local_statistics_stay_with_their_client(entry: Entry, policy: str) -> None:
    if entry.adds_samples or entry.parts or entry.spreads or entry.semi or entry.two_views or entry.still:
        pytest.skip(
            "the numbers below are for BatchNorm of the clients' own samples alone, at the first weights"
        )
    clients = classes((4, 8, 12))
    problem = Problem(network("bn"), clients, ("rounds=2", "clients_per_round=3", "dtype=float64"))
    settings = [f"buffers={policy}", "client.epochs=1", "client.batch_size=12"]
    strategy, result = record(entry, problem, *settings)
    assert torch.equal(result.weights["1.running_mean"], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(result.weights["1.running_var"], torch.ones(5, dtype=torch.float64))
    for client, pair in enumerate(clients):
        expected = torch.cat(first_statistics(pair, torch.arange(len(pair[1]))))
        kept = strategy.kept[0][client]["local/buffers"]
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)
    assert not torch.equal(strategy.kept[0][0]["local/buffers"], strategy.kept[1][0]["local/buffers"])


@spread_cohorts
def test_all_local_norm_weights_never_leave_their_client(entry: Entry) -> None:
    if entry.parts or entry.still:
        pytest.skip("takes no BatchNorm, or keeps to one policy for it")
    problem = classification("bn", cohorts=[[0, 1, 2]] * 3)
    strategy, result = record(entry, problem, "buffers=all_local", "rounds=3")
    initial, first, last = network("bn").state_dict(), strategy.states[0], strategy.states[-1]
    layout = Layout(network("bn"), torch.float32)

    def named(v: Tensor) -> dict[str, Tensor]:
        return layout.named(layout.expand(v))

    for name in ("1.weight", "1.bias"):  # the server never sees theirs
        if entry.trains_alone:  # and trains its own: the sum of the clients' moves tells
            assert "v" not in last or not named(last["v"])[name].any()
        elif "psi" in last:  # which the model begins with on top
            assert torch.equal(named(last["psi"])[name], named(first["psi"])[name])
            assert torch.equal(result.weights[name], initial[name] + named(last["psi"])[name])
        else:
            assert torch.equal(result.weights[name], initial[name])
    assert not torch.equal(result.weights["0.weight"], initial["0.weight"])
    own = [strategy.kept[-1][c]["local/0"] for c in (0, 1, 2)]
    assert all(len(v) == 10 for v in own)
    assert not torch.equal(own[0], own[1])
    assert not strategy.kept[-1][3]


# -- what travels -------------------------------------------------------------------------------------------------


@each_method
def test_with_the_configured_mean_no_single_update_leaves_its_worker(entry: Entry) -> None:
    if entry.has("aggregator") or entry.single:
        pytest.skip("needs single updates: another aggregator, or centroids of clients")
    built = participants.strategy(compose(entry.arguments), None)
    if built.traits.peers:
        pytest.skip("peers need each other's models, and only those")
    kinds = {kind for kinds in fold_kinds(built.folds).values() for kind in kinds}
    assert kinds <= {"mean", "sum"}


# -- messages, dtypes ---------------------------------------------------------------------------------------------


def received(job: Any) -> torch.Tensor:
    """The model of the message, or where a client chooses among several, all."""
    arrays = job.message.arrays
    return arrays["centres"] if "centres" in arrays else arrays["w"]


def scribble(job: Any) -> None:
    if job.client == 1:
        received(job).add_(1)


@in_ways("policy", "skip", "stop")
def test_writing_to_the_message_is_an_error_whatever_the_policy(entry: Entry, policy: str) -> None:
    """Other clients share the message, so a written one must not be used any further."""
    asked = (
        None if entry.asynchronous else [range(3)] * 4
    )  # who starts clients by itself meets client 1 some time
    first = r"\d" if entry.asynchronous else "1"
    with pytest.raises(
        ClientError, match=rf"client 1(?s:.*)round {first}(?s:.*)read-only(?s:.*)'(w|centres)'"
    ):
        run_hooked(entry, scribble, classification(cohorts=asked), f"failures.policy={policy}")


def demand_float64(job: Any) -> None:
    floats = [received(job), *job.state.values(), job.data.read(torch.arange(1)).x, job.model.w]
    floats += (
        [job.start()] if received(job).shape == job.model.w.shape else []
    )  # else a part of the model is trained
    assert {t.dtype for t in floats} == {torch.float64}


@spread_cohorts
def test_float64_means_float64_everywhere(entry: Entry) -> None:
    if entry.trains_alone:
        pytest.skip("clients have no labelled samples to look at")
    problem = classification(entry.model("bn"))
    strategy, result = run_hooked(entry, demand_float64, problem, "dtype=float64")
    held = [*strategy.states[-1].values(), *(v for kept in strategy.kept[-1] for v in kept.values())]
    assert {t.dtype for t in held if isinstance(t, Tensor)} == {torch.float64}
    floats = {v.dtype for v in result.weights.values() if v.is_floating_point()}
    assert floats == {torch.float64}


@spread_cohorts
def test_float32_and_float64_agree_to_rounding(entry: Entry) -> None:
    if entry.needs_head or entry.parts:
        pytest.skip("needs a model with layers, which one vector has not")
    if entry.strategy in ("fedkseed", "fedzo"):
        pytest.skip("differences divided by eps enlarge rounding; or refuses a rate that falls")
    single, double = (
        quadratic().run(*entry.arguments, f"dtype={d}").weights["x"] for d in ("float32", "float64")
    )
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)
