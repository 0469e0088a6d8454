"""FedSpeed's fixed points, and its steps on mini-batches and networks, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from golden_quadratic import COHORTS, GRADIENTS, Z, close
from problems import (
    Problem,
    Quadratic,
    classes,
    linear_loss,
    method,
    network,
    quadratic,
    recorded,
)
from torch.nn import functional as F

from fedsim import rng
from fedsim.task.vectors import FlatModel

# -- section 12: fixed points -------------------------------------------------------------------------------------


def heterogeneous(m: int = 4, d: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strongly convex quadratics that disagree: A (m, 1, d, d), b (m, 1, d), and the minimiser of their mean."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(m, d, d)))[0]
    a = q @ (rng.uniform(0.5, 2.0, size=(m, d))[:, :, None] * q.transpose(0, 2, 1))
    b = rng.normal(size=(m, d)) * 2
    return a[:, None], b[:, None], np.linalg.solve(a.mean(0), b.mean(0))


def test_at_full_participation_fedspeed_reaches_the_optimum_where_fedavg_stalls() -> None:
    a, b, optimum = heterogeneous()
    problem = Problem(
        model=Quadratic(3),
        clients=[(torch.tensor(p), torch.tensor(q)) for p, q in zip(a, b, strict=True)],
        settings=(
            "dtype=float64",
            "clients_per_round=4",
            "client.lr=0.2",
            "client.lr_decay=1",
            "client.epochs=10",
            "client.batch_size=1",
            "client.weight_decay=0",
            "client.clip_norm=null",
        ),
        loss=linear_loss,
    )
    speed = problem.run("strategy=fedspeed", "strategy.rho=0", "strategy.lamb=0.5", "rounds=130")
    assert np.linalg.norm(speed.weights["x"].numpy() - optimum) < 1e-12
    average, result = recorded("fedavg", problem, "rounds=40")
    off = np.linalg.norm(average.series("w") - optimum, axis=1)
    assert off[-1] > 0.4  # of |optimum| = 1.34 ...
    assert abs(off[-1] - off[-2]) < 1e-12  # ... and it has converged there
    assert result.summary["rounds"] == 40


def test_with_the_ascent_of_fixed_length_it_stops_short_of_the_optimum() -> None:
    """The reference shows why convergence needs rho = 0: a normalised ascent does not shrink."""
    a, b, optimum = heterogeneous()
    options: dict[str, Any] = {
        "lr": 0.2,
        "lr_decay": 1.0,
        "lamb": 0.5,
        "weight_decay": 0.0,
        "clip_norm": None,
    }
    trace = reference.fedspeed(reference.affine(a, b), np.zeros(3), [range(4)] * 100, **options)
    assert np.linalg.norm(trace.x[-1] - optimum) > 1e-4


# -- mini-batches and networks ------------------------------------------------------------------------------------


def test_one_minibatch_serves_both_gradients_of_a_step() -> None:
    """A network with shuffled batches and one client, by hand with torch's autograd."""
    (x, y), lamb, rho, lr = classes((10,))[0], 0.1, 0.1, 0.1
    x64, model = x.double(), network().double()
    params = list(model.parameters())
    start = torch.cat([p.detach().reshape(-1) for p in params])
    generator = rng.torch_rng(5, "fit/batches", 0, 0)
    rows = [r for _ in range(2) for r in torch.randperm(10, generator=generator).split(4)]
    assert [len(r) for r in rows] == [4, 4, 2, 4, 4, 2]

    def gradient(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(w, params)
        grads = torch.autograd.grad(F.cross_entropy(model(x64[r]), y[r]), params)
        return torch.cat([g.reshape(-1) for g in grads])

    w = start.clone()
    for r in rows:
        g1 = gradient(w, r)
        g2 = gradient(w + rho / (g1.norm() + 1e-7) * g1, r)
        v = g2 - lamb * start
        v = v * min(1.0, 10 / (float(v.norm()) + 1e-6))
        w = w - lr * (v + (1e-3 + lamb) * w)
    moved = w - start
    expected = start + 2 * moved  # one client: mean(x_K) + hbar = x + moved + moved

    settings = ("dtype=float64", "client=fedspeed_paper", "rounds=1", "clients_per_round=1", "seed=5")
    problem = Problem(network(), [(x, y)], settings)
    run, result = recorded("fedspeed", problem, "client.epochs=2", "client.batch_size=4")
    close(run.states[0]["w"], expected)
    table = result.per_client.set_index("metric").value
    assert table["steps"] == 6
    assert table["samples"] == 20


def test_steps_instead_of_epochs_cut_the_last_pass_short() -> None:
    run, _ = recorded("fedspeed", quadratic(), "client.steps=3")
    assert [len(g) for g in GRADIENTS] == [2] * 4
    three = [[g[0], g[1], g[0]] for g in GRADIENTS]
    close(run.series("w"), reference.fedspeed(three, Z["x0"], COHORTS, epochs=1).x)


def test_the_uplink_is_one_model_and_the_client_keeps_one_vector() -> None:
    """Section 7: h_i alone is kept; section 4: delta alone goes up (plus 8 bytes of weight), x^t comes down."""
    run, result = recorded("fedspeed", quadratic())
    assert all(set(kept) <= {"h"} for row in run.kept for kept in row)
    cohort_sizes = Z["active"].sum(1)
    assert [r["bytes_up"] for r in result.rows] == [n * (6 * 8 + 8) for n in cohort_sizes]
    assert [r["bytes_down"] for r in result.rows] == [n * 6 * 8 for n in cohort_sizes]


def test_switching_the_ascent_off_saves_the_second_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    plain = FlatModel.grad

    def counted(self: FlatModel, *args: Any, again: bool = False, **kwargs: Any) -> Any:
        calls.append(again)
        return plain(self, *args, again=again, **kwargs)

    monkeypatch.setattr(FlatModel, "grad", counted)
    for off, per_step in (("strategy.alpha=0.5", 2), ("strategy.alpha=0", 1), ("strategy.rho=0", 1)):
        calls.clear()
        quadratic(cohorts=[[0]]).run("strategy=fedspeed", off, "rounds=1")
        assert len(calls) == 8 * per_step
        assert sum(calls) == 8 * (per_step - 1)


def test_the_strategy_is_built_from_its_configuration_alone() -> None:
    strategy = method("fedspeed", "strategy.lamb=0.25")
    assert strategy.client.lamb == 0.25
    assert strategy.fold == {"delta": "sum"}
