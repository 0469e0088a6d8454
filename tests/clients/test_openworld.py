"""FedoSSL's losses, Sinkhorn and centroids against independent float64 code on tiny numbers."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies"))
import fedossl_numpy as oracle

from clients.openworld import (
    Constants,
    OpenObjective,
    TwoViews,
    class_weights,
    nearest,
    of_the_same_class,
    pairwise,
    regulariser,
)
from clients.sinkhorn import local_centroids, sinkhorn
from strategies.centroids import aligned, global_centroids, unit_rows

RNG = np.random.default_rng(3)
B, C, D = 9, 4, 5
Y = np.array([0, 1, 1, 0, 2, -100, -100, -100, -100])
COUNTS = np.array([6.0, 1.0, 3.0, 0.0])
M = oracle.unit(RNG.normal(size=(C, D)))
W = RNG.normal(size=(D, C))
Z, Z2 = (RNG.normal(size=(B, D)) for _ in range(2))
VIEWS = (Z, Z @ W, Z2, Z2 @ W)


def close(found: Any, expected: Any, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


def value(views: Any = VIEWS, y: Any = Y, m: Any = M, u: float = 0.3, **options: Any) -> torch.Tensor:
    """The package's objective, nearest partners."""
    objective = OpenObjective(**options)
    tensors = TwoViews(*(v if isinstance(v, torch.Tensor) else torch.from_numpy(v) for v in views))
    labels = torch.from_numpy(y)
    partner = objective.partners(tensors.z, labels, torch.Generator)
    rho = class_weights(torch.from_numpy(COUNTS), objective.tau, objective.form)
    known = Constants(rho, u, None if m is None else torch.from_numpy(m))
    return objective.value(tensors, labels, partner, known)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.5},
    {"beta": 0.0},
    {"gamma": 0.5},
    {"tau": 0.7},
    {"form": "inverse"},
    {"form": "flat"},
    {"margin": False},
    {"entropy": False},
    {"hard": True},
    {"ce_weight": 0.25},
    {"cluster_weight": 0.25},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_objective_is_that_of_the_equations_and_every_option_counts(options: dict[str, Any]) -> None:
    sharp = {"m": 3 * M} if options.get("hard") else {}  # some assignments above 0.95, some below
    found = float(value(**options, **sharp))
    close(found, oracle.objective(VIEWS, Y, COUNTS, 0.3, sharp.get("m", M), **options))
    assert not options or abs(found - float(value(**sharp))) > 1e-3


@pytest.mark.parametrize("some", ["labelled", "unlabelled"])
def test_batches_of_one_kind_leave_out_what_needs_the_other(some: str) -> None:
    y = np.full(B, -100) if some == "unlabelled" else np.abs(Y) % C
    found = float(value(y=y))
    close(found, oracle.objective(VIEWS, y, COUNTS, 0.3, M))
    others = [{"beta": 0.0, "ce_weight": 0.0}] if some == "labelled" else [{"margin": False}]
    close(found, float(value(y=y, **others[0])))


def test_without_centroids_nothing_is_calibrated() -> None:
    close(float(value(m=None)), oracle.objective(VIEWS, Y, COUNTS, 0.3, None))
    close(float(value(m=None)), float(value(gamma=0.0)))


def test_the_gradient_passes_by_the_assignments_of_predictions_and_by_the_counts() -> None:
    inputs = [torch.from_numpy(v).requires_grad_() for v in VIEWS]
    found = torch.autograd.grad(value(inputs), inputs)
    fixed, partner = oracle.q(Z, M), np.asarray(nearest(torch.from_numpy(Z)))
    for i, g in enumerate(found):

        def loss(x: Any, i: int = i) -> float:
            views = [x if j == i else v for j, v in enumerate(VIEWS)]
            return oracle.objective(views, Y, COUNTS, 0.3, M, q_fixed=fixed, partners=partner)

        close(g, oracle.slope(loss, VIEWS[i]), 1e-8)


def test_far_logits_have_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[500.0, 0.0], [0.0, 500.0]], requires_grad=True)
    found = pairwise(logits, torch.tensor([[0.0, 500.0], [500.0, 0.0]]))
    close(found.detach(), 500 - math.log(2), 1e-4)
    views = TwoViews(torch.ones(2, 3), logits, torch.ones(2, 3), logits.detach())
    known = Constants(torch.ones(2), 0.5)
    total = OpenObjective().value(views, torch.tensor([0, -100]), torch.tensor([1, 0]), known)
    (g,) = torch.autograd.grad(total, logits)
    assert bool(torch.isfinite(total)) and bool(torch.isfinite(g).all())


def test_equal_counts_or_tau_of_one_make_the_regulariser_the_mean_uncertainty() -> None:
    logits = torch.from_numpy(VIEWS[1])
    plain = float((1 - torch.softmax(logits, 1).amax(1)).mean())
    equal = class_weights(torch.full((C,), 7.0), 0.2)
    one = class_weights(torch.from_numpy(COUNTS), 1.0)
    for rho in (equal, one):
        close(float(regulariser(logits, rho.double())), plain)
    assert class_weights(torch.zeros(2), 0.5).tolist() == [0.5, 0.5]  # nobody was counted yet


def test_the_margin_is_cut_at_half() -> None:
    close(float(value(u=0.9)), float(value(u=0.5)))
    assert abs(float(value(u=0.5)) - float(value(u=0.4))) > 1e-3


def test_partners_are_the_nearest_others_or_of_the_same_class() -> None:
    z = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-0.1, 3.0], [1.0, 1.1]])
    assert nearest(z).tolist() == [1, 0, 3, 2, 2]
    assert nearest(z[:1]).tolist() == [0]
    y = torch.tensor([0, 1, 0, 0, -100])
    drawn = {
        tuple(of_the_same_class(nearest(z), y, torch.Generator().manual_seed(s)).tolist()) for s in range(40)
    }
    assert {d[0] for d in drawn} == {2, 3} and {d[2] for d in drawn} == {0, 3}
    assert {d[1] for d in drawn} == {0} and {d[4] for d in drawn} == {2}  # alone in its class; without label


@pytest.mark.parametrize("iterations", [1, 10, 100])
def test_sinkhorn(iterations: int) -> None:
    scores = oracle.unit(RNG.normal(size=(12, 3))) @ oracle.unit(RNG.normal(size=(5, 3))).T
    found = sinkhorn(torch.from_numpy(scores), iterations)
    close(found, oracle.sinkhorn(scores, 25, iterations))
    close(found.sum(1), np.ones(12))
    flat = np.zeros((6, 3))
    close(sinkhorn(torch.from_numpy(flat), iterations), np.full((6, 3), 1 / 3))


def test_sinkhorn_looks_at_the_first_of_ten_iterations_and_ends_where_nothing_moves() -> None:
    scores = np.array([[0.02, 0.0], [0.0, 0.02], [0.0, 0.0]]) / 25
    early = sinkhorn(torch.from_numpy(scores), 100)
    close(early, sinkhorn(torch.from_numpy(scores), 1))


def test_local_centroids_keep_what_is_empty() -> None:
    memory = oracle.unit(RNG.normal(size=(14, D)))
    for count in (3, 14):
        start = memory[RNG.permutation(14)[:count]]
        found = local_centroids(torch.from_numpy(memory), torch.from_numpy(start))
        close(found, oracle.local_centroids(memory, start))
        close(np.linalg.norm(found, axis=1), np.ones(count))
    more = oracle.unit(RNG.normal(size=(4, D)))  # than there are rows
    found = local_centroids(torch.from_numpy(memory[:2]), torch.from_numpy(more))
    close(found, oracle.local_centroids(memory[:2], more))
    assert (np.asarray(found) == more).all(axis=1).sum() >= 2


def test_global_centroids() -> None:
    local = np.concatenate([oracle.unit(RNG.normal(size=(8, D))), RNG.normal(size=(3, D))])
    start = oracle.unit(RNG.normal(size=(C, D)))
    found = global_centroids(torch.from_numpy(local), torch.from_numpy(start), 12)
    close(found, oracle.global_centroids(local, start, 12), 1e-8)
    assert float((found - torch.from_numpy(start)).abs().max()) > 1e-3
    assert torch.equal(
        global_centroids(torch.from_numpy(local), torch.from_numpy(start), 0), torch.from_numpy(start)
    )


def test_ids_of_seen_classes_are_their_labels_whatever_order_the_others_have() -> None:
    means, present = RNG.normal(size=(C, D)), torch.tensor([1.0, 0.0, 1.0, 0.0])
    m = torch.from_numpy(M)
    found = aligned(m, torch.from_numpy(means), present)
    close(found, oracle.aligned(M, means, [0, 2]))
    for seed in range(4):
        order = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
        again = aligned(m[order], torch.from_numpy(means), present)
        assert torch.equal(again[[0, 2]], found[[0, 2]])
    assert torch.equal(aligned(m, torch.zeros(C, D, dtype=torch.float64), torch.zeros(C)), m)


def test_random_rows_are_directions() -> None:
    rows = unit_rows(C, D, torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(0))
    close(rows.norm(dim=1), np.ones(C))
