"""What every strategy promises, whatever it computes. The table of strategies is in ``registry.py``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    Fail,
    Pair,
    Problem,
    Quadratic,
    Recorded,
    Sleep,
    classes,
    classification,
    hashes,
    hooked,
    method,
    network,
    of_strategy,
    quadratic,
    recorded,
)
from registry import BROAD, COHORTS, METHODS, TABLE, Entry, broad
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import build
from fedsim.errors import ClientError
from fedsim.fold import fold_kinds
from fedsim.settings import compose

every_method = pytest.mark.parametrize("entry", METHODS, ids=lambda e: e.label)
each_method = pytest.mark.parametrize("entry", [e for e in METHODS if e in COHORTS], ids=lambda e: e.label)
each_strategy = pytest.mark.parametrize("entry", COHORTS, ids=lambda e: e.label)


def in_ways(name: str, *ways: object) -> pytest.MarkDecorator:
    """Every strategy in the first of ``ways``, some in all of them."""
    pairs = broad(*ways)
    return pytest.mark.parametrize(("entry", name), pairs, ids=[f"{e.label}-{way}" for e, way in pairs])


def record(entry: Entry, problem: Problem, *overrides: str) -> tuple[Recorded, Any]:
    return recorded(entry.strategy, problem, *entry.overrides, *overrides)


def run_hooked(entry: Entry, hook: Any, problem: Problem, *overrides: str) -> tuple[Recorded, Any]:
    strategy = hooked(entry.strategy, hook, *entry.overrides)
    rest = [o for o in entry.overrides if not of_strategy(o)]
    return strategy, problem.run(f"strategy={entry.strategy}", *rest, *overrides, strategy=strategy)


# -- same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@in_ways("kind", "bn", "tanh", "dropout")
def test_serial_and_any_number_of_ray_workers_give_the_same_bits(entry: Entry, kind: str, ray: str) -> None:
    problem = classification(entry.model(kind))
    serial = problem.run(*entry.arguments)
    assert len(set(hashes(serial))) == 4  # every round moved the model
    for workers in (1, 2, 3):
        parallel = problem.run(*entry.arguments, ray, f"engine.workers={workers}")
        assert hashes(parallel) == hashes(serial)
        assert parallel.summary["accuracy"] == serial.summary["accuracy"]
        assert parallel.summary["loss"] == serial.summary["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in TABLE if e.label in BROAD], ids=lambda e: e.label)
def test_the_order_in_which_chunks_finish_does_not_matter(entry: Entry, ray: str) -> None:
    problem = classification(cohorts=[range(6)] * 2)
    settings = ["rounds=2", "engine.chunks=6"]
    expected = hashes(problem.run(*entry.arguments, *settings))
    for slow in ({0: 0.3, 1: 0.15}, {5: 0.3, 3: 0.15}):
        _, result = run_hooked(entry, Sleep(slow), problem, *settings, ray, "engine.workers=3")
        assert hashes(result) == expected


@every_method
def test_a_run_repeats_itself_and_depends_on_the_seed(entry: Entry) -> None:
    problem = classification("dropout")
    first, again = (hashes(problem.run(*entry.arguments)) for _ in range(2))
    assert first == again
    assert hashes(problem.run(*entry.arguments, "seed=1"))[-1] != first[-1]


@every_method
def test_global_generators_have_no_say_and_are_left_alone(entry: Entry) -> None:
    problem = classification("dropout")
    expected = hashes(problem.run(*entry.arguments))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert hashes(problem.run(*entry.arguments)) == expected
    assert torch.equal(torch.get_rng_state(), before)


@each_method
def test_other_chunks_change_nothing_beyond_rounding(entry: Entry) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    ends = [problem.run(*entry.arguments, "dtype=float64", f"engine.chunks={n}").weights for n in (1, 2, 6)]
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-13)


@each_method
def test_the_order_of_clients_in_a_given_cohort_does_not_matter(entry: Entry) -> None:
    cohorts = [[0, 3, 5], [1, 2, 4], [5, 1, 3], [2, 0, 4]]
    mixed = [[5, 0, 3], [4, 2, 1], [1, 3, 5], [4, 2, 0]]
    runs = [classification(cohorts=c).run(*entry.arguments) for c in (cohorts, mixed)]
    assert hashes(runs[0]) == hashes(runs[1])
    assert runs[1].rows[0]["cohort"] == [0, 3, 5]


# -- stop and resume ----------------------------------------------------------------------------------------------


class Photographer:
    """Copies the run folder after every round: what a kill at that moment would leave."""

    def __init__(self, folder: Path, album: Path):
        self.folder, self.album, self.count = folder, album, 0

    def round(self, row: dict[str, Any], clients: list[Any]) -> None:
        self.count += 1
        shutil.copytree(self.folder, self.album / f"{self.count}")


@in_ways("every", 3, 1)
def test_killed_after_any_round_and_resumed_the_run_ends_with_the_same_bits(
    entry: Entry, every: int, tmp_path: Path
) -> None:
    problem = classification(entry.model("bn"))
    settings = [*entry.arguments, "rounds=5", f"checkpoint.every={every}", "buffers=local"]
    folder, album = tmp_path / "run", tmp_path / "album"
    expected = problem.run(*settings, f"dir={folder}", callbacks=[Photographer(folder, album)])
    for killed_after in range(1, 5):
        resumed = problem.run(*settings, f"dir={album / str(killed_after)}")
        assert hashes(resumed) == hashes(expected)
        assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4, 5]
        for name, value in expected.weights.items():
            assert torch.equal(resumed.weights[name], value)


class Interrupt:
    """Ctrl-C as the round ends."""

    def __init__(self, at: int):
        self.at = at

    def round(self, row: dict[str, Any], clients: list[Any]) -> None:
        if row["round"] == self.at:
            raise KeyboardInterrupt


@every_method
def test_interrupted_after_any_round_and_resumed_the_run_ends_with_the_same_bits(
    entry: Entry, tmp_path: Path
) -> None:
    problem = classification()
    expected = problem.run(*entry.arguments)
    for at in (1, 2, 3):
        place = f"dir={tmp_path / str(at)}"
        with pytest.raises(KeyboardInterrupt):
            problem.run(*entry.arguments, place, callbacks=[Interrupt(at)])
        resumed = problem.run(*entry.arguments, place)
        assert hashes(resumed) == hashes(expected)
        assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4]


@each_strategy
def test_interrupted_within_a_round_that_round_is_done_again_from_the_start(
    entry: Entry, tmp_path: Path
) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    expected = problem.run(*entry.arguments, "engine.chunks=3")
    for at in (0, 2):  # client 4 is in the last chunk: states of the others have been proposed by then
        settings = ["engine.chunks=3", f"dir={tmp_path / str(at)}"]
        fail = Fail([4], KeyboardInterrupt, tmp_path / f"marker{at}", rounds=[at])
        with pytest.raises(KeyboardInterrupt):
            run_hooked(entry, fail, problem, *settings)
        _, resumed = run_hooked(entry, fail, problem, *settings)
        assert hashes(resumed) == hashes(expected)


@every_method
def test_client_states_spilled_to_disk_are_the_same_states(entry: Entry, tmp_path: Path) -> None:
    problem = classification()
    expected, roomy = record(entry, problem, "rounds=6")
    spilled, tight = record(entry, problem, "rounds=6", "checkpoint.memory_mb=0")
    assert hashes(tight) == hashes(roomy)
    for one, other in zip(expected.kept[-1], spilled.kept[-1], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


# -- who takes part -----------------------------------------------------------------------------------------------


@each_strategy
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
    assert told == [(2, "failed", True)] * 4


@each_method
def test_a_failing_client_stops_the_run_by_default_and_is_named(entry: Entry) -> None:
    cohorts = [[0, 1], [2, 3], [4, 5], [0, 5]]
    with pytest.raises(ClientError, match=r"client 4 failed in round 3(?s:.*)Traceback(?s:.*)has had enough"):
        run_hooked(entry, Fail([4]), classification(cohorts=cohorts))


@each_method
def test_an_empty_cohort_changes_nothing(entry: Entry) -> None:
    strategy, result = record(entry, classification(cohorts=[[0, 1], [], [], [2, 3]]))
    first, second, third, last = hashes(result)
    assert first == second == third != last
    for name, value in strategy.states[0].items():
        assert torch.equal(value, strategy.states[2][name])
    assert result.rows[1]["bytes_up"] == result.rows[1]["bytes_down"] == 0


@each_method
def test_if_nobody_answers_nothing_changes(entry: Entry) -> None:
    fail = Fail(range(6), rounds=[1])
    strategy, result = run_hooked(entry, fail, classification(), "failures.policy=skip")
    first, second, third, _ = hashes(result)
    assert first == second != third
    for name, value in strategy.states[0].items():
        assert torch.equal(value, strategy.states[1][name])
    assert len(result.rows[1]["failures"]) == 3
    for before, after in zip(strategy.kept[0], strategy.kept[1], strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


@each_strategy
def test_absent_clients_keep_their_state_bit_for_bit(entry: Entry) -> None:
    if entry.parts:
        pytest.skip("nothing is kept where there is no BatchNorm")
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
    clients = classes()
    clients[3] = (clients[3][0] * float("nan"), clients[3][1])
    cohorts = [[0, 3], [1, 2], [3, 4], [3, 5]]
    strategy, result = record(entry, classification(clients=clients, cohorts=cohorts))
    named = [(r["round"], f["client"], f["kind"]) for r in result.rows for f in r["failures"]]
    assert named == [(1, 3, "nonfinite"), (3, 3, "nonfinite"), (4, 3, "nonfinite")]
    assert not strategy.kept[-1][3]
    assert all(torch.isfinite(v).all() for v in result.weights.values())
    with pytest.raises(ClientError, match=r"client 3 nonfinite in round 1.*(delta|row 0)"):
        record(entry, classification(clients=clients, cohorts=cohorts), "failures.nonfinite=stop")


def identical(count: int) -> list[Pair]:
    return classes((8,)) * count


@each_strategy
def test_identical_clients_are_one_client(entry: Entry) -> None:
    """Full batches, everybody present: the model goes where a single client's would."""
    if entry.draws or entry.adds_samples:
        pytest.skip("each client draws noise of its own")
    if entry.has("attack") or entry.parts:
        pytest.skip("attackers are not like the others, nor are clients of other widths")
    settings = [*entry.arguments, "dtype=float64", "client.batch_size=8", "client.epochs=3"]
    one = Problem(network(), identical(1), ("rounds=3", "clients_per_round=1")).run(*settings)
    five = Problem(network(), identical(5), ("rounds=3", "clients_per_round=5")).run(*settings)
    for name, value in one.weights.items():
        torch.testing.assert_close(five.weights[name], value, rtol=0, atol=1e-13)


# -- BatchNorm ----------------------------------------------------------------------------------------------------


def first_statistics(pair: Pair, order: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance after one batch through the first layer: 0.9 * (0, 1) + 0.1 * batch (unbiased)."""
    linear = network("bn").double()[0]
    z = linear(pair[0].double()[order]).detach()
    return 0.1 * z.mean(0), 0.9 + 0.1 * z.var(0)


@each_method
def test_averaged_statistics_are_the_weighted_mean_and_counters_stay(entry: Entry) -> None:
    """One step a client on all its samples; the second look of a perturbed gradient must not count."""
    if entry.adds_samples or entry.parts:
        pytest.skip("the numbers below are for BatchNorm of the clients' own samples alone")
    clients = classes((4, 8, 12))
    problem = Problem(network("bn"), clients, ("rounds=1", "clients_per_round=3", "dtype=float64"))
    strategy, result = record(entry, problem, "client.epochs=1", "client.batch_size=12")
    table = result.per_client
    weights = table[table.metric == "weight"].sort_values("client").value.to_numpy()
    assert weights.tolist() in ([4.0, 8.0, 12.0], [1.0, 1.0, 1.0])
    statistics = [first_statistics(pair, torch.arange(len(pair[1]))) for pair in clients]
    for i, name in enumerate(("1.running_mean", "1.running_var")):
        expected = sum(w * s[i] for w, s in zip(weights, statistics, strict=True)) / weights.sum()
        torch.testing.assert_close(result.weights[name], expected, rtol=0, atol=1e-12)
    assert int(result.weights["1.num_batches_tracked"]) == 0
    assert all(v.is_floating_point() for v in strategy.states[0].values())


@pytest.mark.parametrize("policy", ["local", "all_local"])
@each_method
def test_local_statistics_stay_with_their_client(entry: Entry, policy: str) -> None:
    if entry.adds_samples or entry.parts:
        pytest.skip("the numbers below are for BatchNorm of the clients' own samples alone")
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


@each_method
def test_all_local_norm_weights_never_leave_their_client(entry: Entry) -> None:
    if entry.parts:
        pytest.skip("takes no BatchNorm")
    problem = classification("bn", cohorts=[[0, 1, 2]] * 3)
    strategy, result = record(entry, problem, "buffers=all_local", "rounds=3")
    initial = network("bn").state_dict()
    for name in ("1.weight", "1.bias"):
        assert torch.equal(result.weights[name], initial[name])  # the server never sees theirs
    assert not torch.equal(result.weights["0.weight"], initial["0.weight"])
    own = [strategy.kept[-1][c]["local/0"] for c in (0, 1, 2)]
    assert all(len(v) == 10 for v in own)
    assert not torch.equal(own[0], own[1])
    assert not strategy.kept[-1][3]


# -- what travels -------------------------------------------------------------------------------------------------


@each_method
def test_with_the_configured_mean_no_single_update_leaves_its_worker(entry: Entry) -> None:
    if entry.has("aggregator"):
        pytest.skip("another aggregator needs single updates")
    built = build.strategy(compose(entry.arguments), None)
    if built.peers:
        pytest.skip("peers need each other's models, and only those")
    kinds = {kind for kinds in fold_kinds(built.folds).values() for kind in kinds}
    assert kinds <= {"mean", "sum"}


# -- messages, dtypes ---------------------------------------------------------------------------------------------


def scribble(job: Any) -> None:
    if job.client == 1:
        job.anchor.add_(1)


@in_ways("policy", "skip", "stop")
def test_writing_to_the_message_is_an_error_whatever_the_policy(entry: Entry, policy: str) -> None:
    """Other clients share the message, so a written one must not be used any further."""
    with pytest.raises(ClientError, match=r"client 1(?s:.*)round 1(?s:.*)read-only(?s:.*)'w'"):
        run_hooked(entry, scribble, classification(cohorts=[range(3)] * 4), f"failures.policy={policy}")


def demand_float64(job: Any) -> None:
    floats = [job.anchor, *job.state.values(), job.data.read(torch.arange(1)).x, job.model.w]
    floats += (
        [job.start()] if len(job.anchor) == len(job.model.w) else []
    )  # else a part of the model is trained
    assert {t.dtype for t in floats} == {torch.float64}


@each_method
def test_float64_means_float64_everywhere(entry: Entry) -> None:
    problem = classification(entry.model("bn"))
    strategy, result = run_hooked(entry, demand_float64, problem, "dtype=float64")
    tensors = [*strategy.states[-1].values(), *(v for kept in strategy.kept[-1] for v in kept.values())]
    assert {t.dtype for t in tensors} == {torch.float64}
    floats = {v.dtype for v in result.weights.values() if v.is_floating_point()}
    assert floats == {torch.float64}


@each_strategy
def test_float32_and_float64_agree_to_rounding(entry: Entry) -> None:
    if entry.needs_head or entry.parts:
        pytest.skip("needs a model with layers, which one vector has not")
    single, double = (
        quadratic().run(*entry.arguments, f"dtype={d}").weights["x"] for d in ("float32", "float64")
    )
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


# -- FedAvg's own -------------------------------------------------------------------------------------------------


def test_fedavg_with_one_full_batch_step_is_centralised_gradient_descent() -> None:
    clients = classes()
    problem = Problem(network(), clients, ("rounds=5", "clients_per_round=6", "dtype=float64"))
    settings = ["client.epochs=1", "client.batch_size=100", "client.lr_decay=1", "client.weight_decay=0"]
    weights = problem.run("strategy=fedavg", *settings).weights
    model: nn.Module = network().double()
    x, y = (torch.cat(part) for part in zip(*clients, strict=True))
    for _ in range(5):
        loss = F.cross_entropy(model(x.double()), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-13)


def test_fedavg_of_two_clients_by_hand() -> None:
    """x0 = 0; gradients x - 1 and x - 4 on 1 and 2 samples; one step of 0.5: (1 * 0.5 + 2 * 2) / 3 = 1.5."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    clients = [(one, one[0]), (one.repeat(2, 1, 1), 4 * one[0].repeat(2, 1))]
    problem = quadratic(model=Quadratic(1), clients=clients, cohorts=[[0, 1]], initial=None)
    settings = ["rounds=1", "client.steps=1", "client.batch_size=2", "client.lr=0.5", "client.weight_decay=0"]
    assert problem.run("strategy=fedavg", *settings).weights["x"].tolist() == [1.5]
    np.testing.assert_allclose(
        problem.run("strategy=fedavg", "strategy.weighting=uniform", *settings).weights["x"], [1.25]
    )


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
