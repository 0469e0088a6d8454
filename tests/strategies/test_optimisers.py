"""The optimiser family: golden trajectories of the authors' code, and small numbers checked independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_quadratic import COHORTS, GRADIENTS, Z, close
from problems import classes, classification, hashes, method, network, quadratic, recorded
from torch import nn
from torch.nn import functional as F

from clients.fednova import accumulated
from fedsim.errors import ConfigError
from fedsim.task.vectors import FlatModel

PLAIN = ("client.weight_decay=0", "client.clip_norm=null", "client.lr_decay=1")


def local_sgd(i: int, x: np.ndarray, lr: float = 0.1, steps: int = 8, momentum: float = 0.0) -> np.ndarray:
    """Plain local steps on client i's two mini-batches in turn; no decay, no clipping."""
    w, speed = x.copy(), np.zeros_like(x)
    for k in range(steps):
        speed = momentum * speed + GRADIENTS[i][k % 2](w)
        w = w - lr * speed
    return w


# -- golden trajectories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fedcm", "feddyn", "fedadam", "fedsam"])
def test_the_trajectory_is_that_of_the_authors_code(name: str) -> None:
    run, result = recorded(name, quadratic())
    close(run.series("w"), Z[f"{name}_x"])
    close(result.weights["x"], Z[f"{name}_x"][-1])


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fedcm", "feddyn", "fedadam", "fedsam"])
def test_the_trajectory_in_float32(name: str) -> None:
    run, _ = recorded(name, quadratic(), "dtype=float32")
    close(run.series("w"), Z[f"{name}_x_f32"], 1e-5)


def test_duals_control_variates_and_moments_are_those_of_the_authors_code() -> None:
    run, _ = recorded("feddyn", quadratic())
    close(run.of_clients("h", 6), Z["feddyn_h"])
    close(run.series("hbar"), Z["feddyn_h"].mean(1))
    run, _ = recorded("scaffold", quadratic())
    close(run.series("c"), Z["scaffold_c"])
    close(run.of_clients("c", 6), Z["scaffold_ci"])
    run, _ = recorded("fedadam", quadratic())
    close(run.series("m"), Z["fedadam_m"])
    close(run.series("v"), Z["fedadam_v"])


def test_fedspeed_without_ascent_is_feddyn() -> None:
    speed = quadratic().run("strategy=fedspeed", "strategy.rho=0")
    dyn = quadratic().run("strategy=feddyn")
    assert hashes(speed) == hashes(dyn)


# -- SCAFFOLD ----------------------------------------------------------------------------------------------------


def test_scaffold_option_1_takes_the_gradient_of_all_samples_at_the_received_model() -> None:
    run, _ = recorded("scaffold", quadratic(), "strategy.option=1", *PLAIN)
    x, c, ci = Z["x0"].copy(), np.zeros(6), np.zeros((4, 6))
    for t, cohort in enumerate(COHORTS):
        ends, change = [], np.zeros(6)
        for i in cohort:
            w = x.copy()
            for k in range(8):
                w = w - 0.1 * (GRADIENTS[i][k % 2](w) - ci[i] + c)
            ends.append(w)
            new = (GRADIENTS[i][0](x) + GRADIENTS[i][1](x)) / 2
            change, ci[i] = change + new - ci[i], new
        x, c = np.mean(ends, 0), c + change / 4
        close(run.series("w")[t], x)
        close(run.series("c")[t], c)
    close(run.of_clients("c", 6)[-1], ci)


def test_scaffold_divides_by_the_true_steps_or_by_the_references_fraction() -> None:
    sizes = (10, 10)  # batches of 4: 3 steps an epoch, the last one short
    problem = classification(clients=classes(sizes), cohorts=[[0, 1]] * 2)
    own, _ = recorded("scaffold", problem, "rounds=2", "dtype=float64", *PLAIN)
    fraction, _ = recorded(
        "scaffold", problem, "strategy.steps=reference", "rounds=2", "dtype=float64", *PLAIN
    )
    ratio = own.series("c")[0] / fraction.series("c")[0]
    close(
        ratio, np.full_like(ratio, (2 * 10 / 4) / 6), 1e-9
    )  # K = 5 instead of 6: too large a control variate


# -- server optimisers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedyogi", "fedadagrad", "fedavgm"])
def test_server_optimisers_against_their_equations(name: str) -> None:
    run, _ = recorded(name, quadratic(), *PLAIN)
    s = method(name)
    x, m, v = Z["x0"].copy(), np.zeros(6), np.full(6, s.v0)
    for t, cohort in enumerate(COHORTS):
        delta = np.mean([local_sgd(i, x) - x for i in cohort], 0)
        if name == "fedavgm":
            m = 0.9 * m + delta
            x = x + m
        else:
            m = s.beta1 * m + (1 - s.beta1) * delta
            square = delta**2
            v = v - (1 - s.beta2) * square * np.sign(v - square) if name == "fedyogi" else v + square
            x = x + s.server_lr * m / (np.sqrt(v) + s.tau)
        close(run.series("w")[t], x)


# -- FedCM, SAM --------------------------------------------------------------------------------------------------


def test_mofedsam_mixes_the_perturbed_gradient_with_the_global_direction() -> None:
    run, _ = recorded("mofedsam", quadratic(), *PLAIN)
    x, direction = Z["x0"].copy(), np.zeros(6)
    for t, cohort in enumerate(COHORTS):
        ends = []
        for i in cohort:
            w = x.copy()
            for k in range(8):
                g = GRADIENTS[i][k % 2](w)
                g = GRADIENTS[i][k % 2](w + 0.1 * g / (np.linalg.norm(g) + 1e-7))
                w = w - 0.1 * (0.1 * g + 0.9 * direction)
            ends.append(w)
        delta = np.mean(ends, 0) - x
        x, direction = x + delta, -delta / (8 * 0.1)
        close(run.series("w")[t], x)


# -- FedNova -----------------------------------------------------------------------------------------------------


def test_work_is_what_a_constant_gradient_moves() -> None:
    for steps, momentum in [(1, 0.0), (7, 0.0), (1, 0.9), (5, 0.5), (20, 0.9)]:
        speed = moved = 0.0
        for _ in range(steps):
            speed = momentum * speed + 1.0
            moved += speed
        assert accumulated(steps, momentum) == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_weighs_directions_not_distances(momentum: float) -> None:
    clients = [(torch.tensor(Z["A"][0]), torch.tensor(Z["b"][0]))]  # 2 samples: 4 epochs of 2 batches
    clients += [(torch.tensor(np.tile(Z["A"][1], (3, 1, 1))), torch.tensor(np.tile(Z["b"][1], (3, 1))))]  # 6
    problem = quadratic(clients=clients, cohorts=[[0, 1]])
    result = problem.run("strategy=fednova", "rounds=1", f"client.momentum={momentum}", *PLAIN)
    work = [accumulated(8, momentum), accumulated(24, momentum)]
    ends = [
        local_sgd(0, Z["x0"], steps=8, momentum=momentum),
        local_sgd(1, Z["x0"], steps=24, momentum=momentum),
    ]
    share = [2 / 8, 6 / 8]
    direction = sum(p * (w - Z["x0"]) / a for p, w, a in zip(share, ends, work, strict=True))
    close(result.weights["x"], Z["x0"] + sum(p * a for p, a in zip(share, work, strict=True)) * direction)


def test_fednova_with_equal_work_is_fedavg() -> None:
    problem = classification(clients=classes((8, 8, 8, 8)))
    nova = problem.run("strategy=fednova", "dtype=float64")
    avg = problem.run("strategy=fedavg", "dtype=float64")
    for k, v in avg.weights.items():
        close(nova.weights[k], v, 1e-14)


# -- MOON --------------------------------------------------------------------------------------------------------


def test_moon_is_fedavg_until_a_client_comes_back_and_then_adds_the_contrast() -> None:
    problem = classification(cohorts=[[0], [0]], clients=classes((8,)))
    one_step = ("rounds=2", "client.steps=1", "client.batch_size=8", "client.shuffle=false", "dtype=float64")
    run, _ = recorded("moon", problem, *one_step, *PLAIN)
    plain, _ = recorded("fedavg", problem, *one_step, *PLAIN)
    close(run.series("w")[0], plain.series("w")[0], 0)

    model, (x, y) = network().double(), problem.clients[0]
    x = x.double()
    first = torch.tensor(
        run.series("w")[0]
    )  # after round 1 the global model and the client's last one are the same
    torch.nn.utils.vector_to_parameters(first, model.parameters())
    near = model.features(x).detach()
    z = model.features(x)
    same = torch.stack([F.cosine_similarity(z, near), F.cosine_similarity(z, near)], 1) / 0.5
    contrast = F.cross_entropy(same, torch.zeros(8, dtype=torch.long))
    assert float(contrast.detach()) == pytest.approx(np.log(2))
    loss = F.cross_entropy(model.head(z), y) + contrast
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    close(run.series("w")[1], first - 0.1 * grads, 1e-12)


def test_moon_pulls_to_the_global_and_from_the_previous_representation() -> None:
    problem = classification(cohorts=[[0, 1], [0]], clients=classes((8, 8)))
    one_step = ("rounds=2", "client.steps=1", "client.batch_size=8", "client.shuffle=false", "dtype=float64")
    run, _ = recorded("moon", problem, "strategy.mu=5", *one_step, *PLAIN)
    flat, (x, y) = FlatModel(network(), torch.float64), problem.clients[0]
    x = x.double()

    def features(w: torch.Tensor) -> torch.Tensor:
        return flat.apply(w, x, lambda m, b: m.features(b))

    start = flat.w.clone()
    last = start - 0.1 * flat.grad(start, x, y, F.cross_entropy)[0]
    now = flat.layout.expand(torch.tensor(run.series("w")[0]))
    near, far = features(now), features(last)

    def loss(pair: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        s, p = (F.cosine_similarity(pair[0], r) / 0.5 for r in (near, far))
        return F.cross_entropy(pair[1], target) - 5 * (s - torch.logaddexp(s, p)).mean()

    def both(m: nn.Module, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return m.features(b), m(b)

    g, _ = flat.grad(now, x, y, loss, forward=both)
    close(run.series("w")[1], flat.layout.compact(now - 0.1 * g), 1e-12)


def test_moon_needs_a_representation() -> None:
    with pytest.raises(ConfigError, match=r"Moon needs model\.features.*and model\.head"):
        quadratic().run("strategy=moon")


# -- FedBN and the references ------------------------------------------------------------------------------------


def test_fedbn_keeps_batch_norm_with_its_client_and_shares_the_rest() -> None:
    problem = classification("bn")
    fedbn = problem.run("strategy=fedbn")
    policy = problem.run("strategy=fedavg", "buffers=all_local")
    assert hashes(fedbn) == hashes(policy) != hashes(problem.run("strategy=fedavg"))
    initial = network("bn").state_dict()
    assert torch.equal(fedbn.weights["1.weight"], initial["1.weight"])
    assert not torch.equal(fedbn.weights["0.weight"], initial["0.weight"])


def test_local_only_shares_nothing_and_reports_the_mean_of_its_clients() -> None:
    problem = classification(cohorts=[[0, 1, 2]] * 2)
    run, result = recorded("local_only", problem, "rounds=2", "evaluation.every=1", *PLAIN)
    alone = [
        classification(clients=[pair], cohorts=[[0]] * 2).run("strategy=fedavg", "rounds=2", *PLAIN)
        for pair in problem.clients[:1]
    ]
    model = network()
    model.load_state_dict(alone[0].weights)
    own = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    close(run.kept[-1][0]["w"], own, 1e-6)
    assert sum(row["bytes_up"] for row in result.rows) == 2 * 3 * 8  # nothing but each update's weight
    x, y = problem.test
    scores = []
    for kept in run.kept[-1]:
        if kept:
            torch.nn.utils.vector_to_parameters(kept["w"], model.parameters())
        else:
            model = network()
        scores.append(float((model(x).argmax(1) == y).double().mean()))
    assert result.rows[-1]["accuracy"] == pytest.approx(np.mean(scores))
    assert result.rows[-1]["worst/accuracy"] == min(scores)


def test_centralised_is_sgd_over_everything() -> None:
    problem = classification(
        settings=("rounds=2", "client.epochs=1", "client.batch_size=49", "clients_per_round=1")
    )
    result = problem.run("strategy=centralised", "dtype=float64", *PLAIN)
    model = network().double()
    x = torch.cat([x for x, _ in problem.clients]).double()
    y = torch.cat([y for _, y in problem.clients])
    assert len(x) == 49
    for _ in range(2):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    for k, v in model.state_dict().items():
        close(result.weights[k], v, 1e-12)
