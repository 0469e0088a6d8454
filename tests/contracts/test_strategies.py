"""What every strategy promises of its bits, and what FedAvg computes. The table of strategies is in ``registry.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hooks import Sleep
from problems import Problem, Quadratic, classes, classification, hashes, network, quadratic
from registry import BROAD, TABLE, Entry
from torch import nn
from torch.nn import functional as F
from trial import in_ways, run_hooked, spread_cohorts, spread_methods, straight

# -- same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@in_ways("kind", "bn", "tanh", "dropout")
def test_serial_and_any_number_of_ray_workers_give_the_same_bits(entry: Entry, kind: str, ray: str) -> None:
    problem, serial = classification(entry.model(kind)), straight(entry, entry.model(kind))
    assert len(set(hashes(serial))) == entry.moves(4)  # every round moved the model
    every = entry.label in BROAD and kind == "bn"
    for workers in (1, 2, 3) if every else (2,):  # there are two chunks a round
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
    for slow in ({0: 0.1, 1: 0.05}, {5: 0.1, 3: 0.05}):
        _, result = run_hooked(entry, Sleep(slow), problem, *settings, ray, "engine.workers=3")
        assert hashes(result) == expected


@spread_methods
def test_a_run_repeats_itself_whatever_the_global_generator_says_and_depends_on_the_seed(
    entry: Entry,
) -> None:
    problem, first = classification("dropout"), hashes(straight(entry, "dropout"))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert hashes(problem.run(*entry.arguments)) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert hashes(problem.run(*entry.arguments, "seed=1"))[-1] != first[-1]


@spread_cohorts
def test_other_chunks_change_nothing_beyond_rounding(entry: Entry) -> None:
    if entry.strategy == "fedzo":
        pytest.skip("differences divided by eps enlarge rounding")
    problem = classification(cohorts=[range(6)] * 4)
    ends = [problem.run(*entry.arguments, "dtype=float64", f"engine.chunks={n}").weights for n in (1, 6)]
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-13)


@spread_cohorts
def test_the_order_of_clients_in_a_given_cohort_does_not_matter(entry: Entry) -> None:
    cohorts = [[0, 3, 5], [1, 2, 4], [5, 1, 3], [2, 0, 4]]
    mixed = [[5, 0, 3], [4, 2, 1], [1, 3, 5], [4, 2, 0]]
    runs = [classification(cohorts=c).run(*entry.arguments) for c in (cohorts, mixed)]
    assert hashes(runs[0]) == hashes(runs[1])
    assert runs[1].rows[0]["cohort"] == [0, 3, 5]


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
