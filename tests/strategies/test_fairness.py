"""q-FedAvg, TERM and agnostic FL: reference arrays, their limits, and rounds against the equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, Problem, classes, classification, hashes, network, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from strategies.afl import afl_step, project_simplex
from strategies.qfedavg import qfedavg_step
from strategies.term import term_weights
from strategies.weighed import clipped, shifted_powers

EXACT = ("dtype=float64", "client.epochs=1", "client.batch_size=1000", "client.weight_decay=0")
EXACT = (*EXACT, "client.clip_norm=null", "client.lr_decay=1")
NORMAL = ("strategy=fedavg", "strategy.weighting=uniform")


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "fairness.npz") as z:
        return {k: torch.from_numpy(v) for k, v in z.items() if v.dtype.kind == "f"}


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_qfedavg_gives_the_reference_models() -> None:
    z = golden()
    for q in z["qs"].tolist():
        found = qfedavg_step(z["w"], z["deltas"], z["losses"], float(z["lr"]), q)
        close(found, z[f"qffl_{q:g}"])


def test_qfedavg_is_the_authors_form_and_depends_on_the_scale_of_losses() -> None:
    z, q, lr = golden(), 2.0, float(golden()["lr"])
    w, deltas, losses = z["w"], z["deltas"], z["losses"] + 1e-10
    large = -deltas / lr  # L (w - w_k)
    h = q * losses ** (q - 1) * large.square().sum(1) + losses**q / lr
    close(
        qfedavg_step(w, deltas, losses - 1e-10, lr, q),
        w - (losses**q)[:, None].mul(large).sum(0) / h.sum(),
        1e-12,
    )
    ten = qfedavg_step(w, deltas, 10 * losses, lr, q)
    assert float((ten - qfedavg_step(w, deltas, losses, lr, q)).abs().max()) > 1e-3
    close(qfedavg_step(w, deltas, 10 * losses, lr, 0), qfedavg_step(w, deltas, losses, lr, 0), 0)


def test_term_gives_the_reference_weights() -> None:
    z = golden()
    for t, expected in zip(z["ts"].tolist(), z["term"], strict=True):
        close(term_weights(z["losses"], z["sizes"], t), expected)


def test_projection_on_the_simplex() -> None:
    z = golden()
    for v, expected in zip(z["simplex_in"], z["simplex_out"], strict=True):
        found = project_simplex(v)
        close(found, expected)
        close(project_simplex(found), found)
        assert float(found.sum()) == pytest.approx(1, abs=1e-12)
        assert (found[v.argsort()].diff() >= 0).all()


def test_losses_that_diverge_and_a_rate_of_zero_are_taken() -> None:
    found = project_simplex(torch.tensor([0.2, 1e30, 1e20, 0.3], dtype=torch.float64))
    assert found.tolist() == [0, 1, 0, 0]
    w, losses = torch.zeros(3), torch.tensor([0.5, 2.0])
    assert qfedavg_step(w, torch.zeros(2, 3), losses, 0.0, 2.0).tolist() == [0, 0, 0]


def test_agnostic_fl_gives_the_reference_rounds() -> None:
    z = golden()
    w, lam = z["w"], torch.full((6,), 1 / 6, dtype=torch.float64)
    for t in range(6):
        close(w, z["afl_w"][t])
        close(lam, z["afl_lambda"][t])
        losses = (w - z["afl_targets"]).square().sum(1) / 2
        w, lam = afl_step(w, lam, 0.1 * (z["afl_targets"] - w), losses, float(z["afl_step"]))
    close(w, z["afl_w"][6])
    close(lam, z["afl_lambda"][6])


def test_agnostic_fl_finds_the_minimax_point_of_two_quadratics() -> None:
    """F_1 = |w|^2 / 2, F_2 = (1 + |w - b|^2) / 2: equal where b.w = (1 + |b|^2) / 2 on the line between the minima."""
    b = torch.tensor([2.0, 0.0], dtype=torch.float64)
    minima, floor = torch.stack([torch.zeros_like(b), b]), torch.tensor([0.0, 0.5], dtype=torch.float64)
    w, lam = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(4000):
        losses = (w - minima).square().sum(1) / 2 + floor
        w, lam = afl_step(w, lam, 0.1 * (minima - w), losses, 0.01)
    losses = (w - minima).square().sum(1) / 2 + floor
    assert abs(float(losses[0] - losses[1])) < 1e-3
    close(w, torch.tensor([1.25, 0.0], dtype=torch.float64), 1e-3)
    close(lam, torch.tensor([0.375, 0.625], dtype=torch.float64), 1e-3)


def test_weights_hang_on_nobody_else_beyond_a_power_of_two() -> None:
    few, many = shifted_powers([0.3, -2.7]), shifted_powers([0.3, -2.7, 900.5, -2000])
    assert torch.equal(few[0] / few[1], many[0] / many[1]) and many[2] > 1 and many[3] == 0
    assert clipped([1.0, 2.0, 90.0], 3) == [1.0, 2.0, 6.0] and clipped([5.0], None) == [5.0]


@pytest.mark.parametrize("ray_too", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fair", "plain"),
    [
        (("strategy=qfedavg", "strategy.q=0"), NORMAL),
        (("strategy=qfedavg", "strategy.q=0", "strategy.weighting=samples"), ("strategy=fedavg",)),
        (("strategy=term", "strategy.t=0"), ("strategy=fedavg",)),
        (("strategy=afl", "strategy.step=0"), NORMAL),
        (
            ("strategy=qfedavg", "strategy.q=0", "strategy@strategy.base=fedprox"),
            ("strategy=fedprox", "strategy.weighting=uniform"),
        ),
    ],
    ids=lambda v: " ".join(v[:3]) if len(v) > 2 else v[0],
)
def test_without_fairness_they_are_fedavg_bit_for_bit(
    fair: Any, plain: Any, ray_too: bool, request: pytest.FixtureRequest
) -> None:
    problem = classification("bn")
    engine = (request.getfixturevalue("ray"), "engine.workers=2") if ray_too else ()
    assert hashes(problem.run(*fair, *engine)) == hashes(problem.run(*plain))


def steps(
    problem: Problem, model: nn.Module, who: Any = range(6)
) -> tuple[list[float], list[Tensor], Tensor]:
    """Losses, full-batch updates of lr .1, and the flat model, in plain torch."""
    losses, deltas = [], []
    params = list(model.parameters())
    for c in who:
        x, y = problem.clients[c]
        loss = F.cross_entropy(model(x.double()), y)
        grads = torch.autograd.grad(loss, params)
        losses.append(float(loss.detach()))
        deltas.append(torch.cat([-0.1 * g.flatten() for g in grads]))
    return losses, deltas, torch.cat([p.detach().flatten() for p in params])


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in weights.values()])


def everybody(*more: str) -> Any:
    problem = classification(settings=("rounds=1", "clients_per_round=6", "engine.chunks=2"))
    return problem, problem.run(*EXACT, "client.lr=0.1", *more)


def test_rounds_follow_the_equations() -> None:
    problem, _ = everybody()
    sizes = [len(y) for _, y in problem.clients]
    losses, deltas, w = steps(problem, network().double())
    stack, found = torch.stack(deltas), torch.tensor(losses, dtype=torch.float64)
    close(
        flat(everybody("strategy=qfedavg", "strategy.q=2")[1].weights),
        qfedavg_step(w, stack, found, 0.1, 2),
        1e-13,
    )
    expected = w + term_weights(found, sizes, 3.0) @ stack
    close(flat(everybody("strategy=term", "strategy.t=3")[1].weights), expected, 1e-13)
    capped = clipped(losses, 0.9)
    expected = w + term_weights(capped, sizes, 3.0) @ stack
    found_w = flat(everybody("strategy=term", "strategy.t=3", "strategy.clip_loss=0.9")[1].weights)
    close(found_w, expected, 1e-13)
    n = torch.tensor(sizes, dtype=torch.float64)
    r = n * (found + 1e-10)
    b = n * stack.square().sum(1) / 0.1
    expected = w + r @ stack / (r + b).sum()
    found_w = flat(everybody("strategy=qfedavg", "strategy.q=1", "strategy.weighting=samples")[1].weights)
    close(found_w, expected, 1e-13)


def test_rounds_of_agnostic_fl_with_a_cohort() -> None:
    problem = classification(cohorts=[[0, 2, 5]], settings=("rounds=1", "clients_per_round=3"))
    recording, result = recorded("afl", problem, *EXACT, "client.lr=0.1", "strategy.step=0.05")
    losses, deltas, w = steps(problem, network().double(), (0, 2, 5))
    close(flat(result.weights), w + torch.stack(deltas).mean(0), 1e-13)
    F_hat = torch.zeros(6, dtype=torch.float64)
    F_hat[[0, 2, 5]] = 2 * torch.tensor(losses, dtype=torch.float64)
    close(recording.states[0]["lambda"], project_simplex(1 / 6 + 0.05 * F_hat), 1e-13)


def test_agnostic_fl_by_domain_weighs_samples_within() -> None:
    names = ["a", "a", "b", "b", "b", "c"]
    problem = classification(cohorts=[[0, 1, 3]], settings=("rounds=1", "clients_per_round=3"))
    settings = (*EXACT, "client.lr=0.1", "strategy=afl", "strategy.groups=domain", "strategy.step=0.1")
    result = problem.run(*settings, domains=names)
    losses, deltas, w = steps(problem, network().double(), (0, 1, 3))
    expected = w + (7 / 19 * deltas[0] + 12 / 19 * deltas[1] + deltas[2]) / 2
    close(flat(result.weights), expected, 1e-13)
    mean = (7 * losses[0] + 12 * losses[1]) / 19
    lam = project_simplex(
        1 / 3 + 0.1 * torch.tensor([mean, losses[2], (mean + losses[2]) / 2], dtype=torch.float64)
    )
    assert result.rows[0]["lambda_max"] == pytest.approx(float(lam.max()), abs=1e-13)


def test_the_loss_costs_a_forward_pass_and_the_model_goes_down_once() -> None:
    problem, result = everybody("strategy=term")
    d = flat(result.weights).numel()
    row = result.rows[0]
    assert row["bytes_down"] == 6 * (8 * d + 8)
    passes = result.per_client.query("metric == 'training_loss/forwards'").value
    assert passes.tolist() == [float(len(y)) for _, y in problem.clients]
    assert 1 <= row["effective_clients"] <= 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("strategy=qfedavg", "strategy.q=16"), r"strategy.q=16: must lie in \[0, 15\]"),
        (("strategy=qfedavg", "aggregator=coordinate_median"), "bounded for the mean; leave aggregator out"),
        (("strategy=qfedavg", "strategy@strategy.base=fedavgm"), "its server does more than average"),
        (("strategy=term", "strategy.base.weighting=uniform"), "base.weighting=uniform: has no say here"),
        (("strategy=term", "strategy.clip_loss=0"), "clip_loss=0: must be positive"),
        (("strategy=afl", "strategy.groups=domain"), r"client \[0\] has no domain"),
        (("strategy=afl", "strategy.step=-1"), "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run(*settings)


def test_robust_rules_see_the_weights() -> None:
    problem = Problem(network(), classes((8,)) * 5, ("rounds=1", "clients_per_round=5"))
    assert problem.run("strategy=term", "aggregator=coordinate_median").rows[0]["failures"] == []
