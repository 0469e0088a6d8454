"""FedNTD and FedProto against numbers computed another way; local Adam against torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import classes, classification, hashes, network, recorded
from torch import nn
from torch.nn import functional as F

from clients.fedntd import not_true_distillation
from clients.fedproto import class_mean_distance
from fedsim.errors import ConfigError

ONE_STEP = ("client.epochs=1", "client.batch_size=1000", "client.weight_decay=0", "client.clip_norm=null")
EXACT = ("dtype=float64", *ONE_STEP)


def test_distillation_leaves_the_true_class_out() -> None:
    """Three classes, the true one 1: softmaxes over classes 0 and 2, by hand."""
    student, teacher = torch.tensor([[0.0, 9.0, math.log(3)]]), torch.tensor([[math.log(4), -7.0, 0.0]])
    p, q = (0.8, 0.2), (0.25, 0.75)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = not_true_distillation(student, teacher, torch.tensor([1]), 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    same = not_true_distillation(student, student + 2, torch.tensor([1]), 3.0)
    assert float(same) == pytest.approx(0, abs=1e-6)
    soft = not_true_distillation(2 * student, 2 * teacher, torch.tensor([1]), 2.0)
    assert float(soft) == pytest.approx(4 * expected, rel=1e-6)


def test_fedntd_steps_by_hand() -> None:
    """Two full-batch steps of one client on the joint loss, the received model as the teacher."""
    problem = classification(cohorts=[[1]], settings=("rounds=1", "clients_per_round=1"))
    settings = ["strategy=fedntd", "strategy.beta=0.7", "strategy.tau=2", *EXACT, "client.epochs=2"]
    found = problem.run(*settings).weights
    x, y = problem.clients[1][0].double(), problem.clients[1][1]
    model, teacher = network().double(), network().double()
    for _ in range(2):
        logits, taught = model(x), teacher(x).detach()
        others = torch.ones(len(y), 3, dtype=torch.bool).scatter_(1, y[:, None], False)
        student, goal = (z[others].view(len(y), 2).div(2).log_softmax(1) for z in (logits, taught))
        loss = F.cross_entropy(logits, y) + 0.7 * 4 * (goal.exp() * (goal - student)).sum(1).mean()
        descend(model, loss)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def descend(model: nn.Module, loss: Any, lr: float = 0.1) -> None:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p -= lr * g


def test_without_weight_fedntd_and_fedproto_are_fedavg() -> None:
    _, plain = recorded("fedavg", classification())
    for name, options in (
        ("fedntd", ["strategy.beta=0"]),
        ("fedproto", ["strategy.lamb=0", "strategy.share=model"]),
    ):
        _, found = recorded(name, classification(), *options)
        for key, value in plain.weights.items():
            torch.testing.assert_close(found.weights[key], value, rtol=0, atol=1e-6)


def test_prototypes_are_class_means_over_the_cohort() -> None:
    problem = classification(cohorts=[[0, 1], [2]])
    settings = ["rounds=2", "dtype=float64", "client.epochs=1"]
    run, _ = recorded("fedproto", problem, *settings)
    model = network().double()
    sums, counts = torch.zeros(3, 5).double(), torch.zeros(3)
    for client in (0, 1):
        w, (x, y) = run.kept[0][client]["w"], problem.clients[client]
        nn.utils.vector_to_parameters(w, model.parameters())
        with torch.no_grad():
            z = model.features(x.double())  # type: ignore[operator]
        for label in range(3):
            sums[label] += z[y == label].sum(0)
            counts[label] += (y == label).sum()
    torch.testing.assert_close(run.states[0]["prototypes"], sums / counts[:, None], rtol=0, atol=1e-12)
    absent = [c for c in range(3) if c not in problem.clients[2][1].tolist()]
    for label in absent:
        assert torch.equal(run.states[1]["prototypes"][label], run.states[0]["prototypes"][label])


@pytest.mark.parametrize("pull", ["samples", "means"])
def test_fedproto_steps_by_hand(pull: str) -> None:
    """The second round of one client: cross entropy plus the mean squared distance to the prototypes of the first,
    of every sample (the authors' code) or of the class means, summed over classes (eq. 7)."""
    problem = classification(cohorts=[[1], [1]], settings=("rounds=2", "clients_per_round=1"))
    run, _ = recorded("fedproto", problem, *EXACT, "strategy.lamb=0.5", f"strategy.pull={pull}")
    x, y = problem.clients[1][0].double(), problem.clients[1][1]
    model = network().double()
    nn.utils.vector_to_parameters(run.kept[0][1]["w"], model.parameters())
    z = model.features(x)  # type: ignore[operator]
    prototypes = run.states[0]["prototypes"]
    if pull == "samples":
        distance = sum((z[i] - prototypes[y[i]]).square().sum() for i in range(12)) / (12 * 5)
    else:
        distance = sum((z[y == c].mean(0) - prototypes[c]).square().mean() for c in y.unique().tolist())
    loss = F.cross_entropy(model.head(z), y) + 0.5 * distance  # type: ignore[operator]
    descend(model, loss)
    found = run.kept[1][1]["w"]
    torch.testing.assert_close(found, nn.utils.parameters_to_vector(model.parameters()), rtol=0, atol=1e-12)


def test_class_means_without_prototype_are_not_pulled() -> None:
    z = torch.tensor([[1.0, 3.0], [3.0, 5.0], [9.0, 9.0], [0.0, 2.0]])
    means, known = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0, 1.0])
    found = class_mean_distance(z, torch.tensor([0, 0, 1, 2]), means, known)
    assert float(found) == (1 + 9) / 2 + (0 + 1) / 2  # class 0: (2, 4) to (1, 1); class 2: (0, 2) to (0, 1)


def test_personal_models_stay_with_their_clients() -> None:
    run, result = recorded("fedproto", classification(cohorts=[range(6)] * 3), "rounds=3")
    assert len(set(hashes(result))) == 1  # the global model is not trained
    models = [kept["w"] for kept in run.kept[-1]]
    assert not any(torch.equal(models[0], other) for other in models[1:])
    x, y = classes((11,), seed=1)[0]
    prototypes, head, nearest = run.states[-1]["prototypes"], [], []
    assert bool(run.states[-1]["known"].all())
    for w in models:
        model = network()
        nn.utils.vector_to_parameters(w, model.parameters())
        head.append(float((model(x).argmax(1) == y).double().mean()))
        apart = (model.features(x)[:, None] - prototypes).square().sum(2)  # type: ignore[operator]
        nearest.append(float((apart.argmin(1) == y).double().mean()))
    assert result.rows[-1]["accuracy"] == pytest.approx(sum(nearest) / 6)
    assert result.rows[-1]["head/accuracy"] == pytest.approx(sum(head) / 6)
    assert sum(nearest) != sum(head)
    assert result.rows[0]["bytes_up"] == 6 * (4 * (3 * 5 + 3) + 8)


def test_a_class_without_prototype_is_never_the_nearest() -> None:
    """Only client 0 trains, on classes 0 and 1; clients are measured on samples of their own, all of them class 2."""
    clients = [(x, y.clamp(max=1) if i == 0 else torch.full_like(y, 2)) for i, (x, y) in enumerate(classes())]
    problem = classification(clients=clients, cohorts=[[0]])
    settings = ["rounds=1", "evaluation.holdout=0.5", "evaluation.clients_every=1"]
    result = problem.run("strategy=fedproto", *settings, test=None)
    table = result.per_client.query("metric == 'evaluate/accuracy' and client > 0")
    assert len(table) and not table.value.any()
    heads = result.per_client.query("metric == 'evaluate/head/accuracy' and client > 0").value
    assert len(heads) == len(table)


def test_local_adam_is_torchs() -> None:
    """Five full-batch epochs of one client, weight decay included; the moments start anew in the second round."""
    problem = classification(cohorts=[[1], [1]], settings=("rounds=2", "clients_per_round=1"))
    settings = ["client=adam", "client.lr=0.03", "client.epochs=5", "client.batch_size=1000"]
    found = problem.run("strategy=fedavg", *settings, "client.weight_decay=0.01", "dtype=float64").weights
    x, y = problem.clients[1][0].double(), problem.clients[1][1]
    model = network().double()
    for _ in range(2):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.03, weight_decay=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scaffold", "fednova", "fedcm"])
def test_rules_that_read_gradients_from_steps_refuse_adam(name: str) -> None:
    with pytest.raises(ConfigError, match="use client=sgd instead of adam"):
        classification().run(f"strategy={name}", "client=adam")


def test_adam_has_no_heavy_ball_besides() -> None:
    with pytest.raises(ConfigError, match=r"type client\.adam\.beta1"):
        classification().run("strategy=fedavg", "client=adam", "client.momentum=0.9")
    with pytest.raises(ConfigError, match=r"client\.adam\.beta1=1"):
        classification().run("strategy=fedavg", "client=adam", "client.adam.beta1=1")
