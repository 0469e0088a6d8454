"""Analytic federated learning: sums of clients' moments against the pooled solution, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import GOLDEN, classification, hashes, network
from torch import Tensor, nn

from clients.ridge import moments, packed, solution, unpacked
from fedsim.errors import StrategyError, TooFewUpdates
from strategies.analytic import joined, pairwise, ridge_solution

RUN = ("strategy=analytic", "dtype=float64", "rounds=1")


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "oneshot.npz") as z:
        return dict(z)


def one_hot(y: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(y, classes).double()


def test_messages_and_what_they_add_up_to_are_golden() -> None:
    z = golden()
    gamma, ridge = float(z["gamma"]), float(z["ridge"])
    X = [torch.tensor(z[f"X{k}"]) for k in range(5)]
    Y = [one_hot(torch.tensor(z[f"y{k}"]), 4) for k in range(5)]
    sent = [solution(x, y, gamma) for x, y in zip(X, Y, strict=True)]
    for k, (C, W) in enumerate(sent):
        np.testing.assert_allclose(C, z[f"C{k}"], atol=1e-10)
        np.testing.assert_allclose(W, z[f"W{k}"], atol=1e-10)
    C, W = [c for c, _ in sent], [w for _, w in sent]
    whole = joined(C, W, gamma)
    np.testing.assert_allclose(ridge_solution(*whole, ridge), z["W_ridge"], atol=1e-10)
    np.testing.assert_allclose(ridge_solution(*whole, 0.0), z["W_zero"], atol=1e-10)
    C_law, W_law = pairwise(C, W)
    np.testing.assert_allclose(C_law, z["C_law"], atol=1e-9)
    np.testing.assert_allclose(W_law, z["W_law"], atol=1e-9)
    plain = [moments(x, y) for x, y in zip(X, Y, strict=True)]
    for own, direct in zip(whole, (sum(part) for part in zip(*plain, strict=True)), strict=True):
        torch.testing.assert_close(own, direct, atol=1e-11, rtol=0)


def test_a_client_that_leaves_leaves_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (9, 4, 12)]
    labels = [one_hot(torch.arange(len(x)) % 3, 3) for x in parts]
    sent = [solution(x, y, 0.7) for x, y in zip(parts, labels, strict=True)]
    two = joined(*zip(*sent[:2], strict=True), 0.7)
    three = joined(*zip(*sent, strict=True), 0.7)
    C, W = sent[2]
    left = three[0] - (C - 0.7 * torch.eye(6, dtype=torch.float64)), three[1] - C @ W
    for a, b in zip(left, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    first, again = (ridge_solution(*pair, 1.0) for pair in (two, left))
    torch.testing.assert_close(first, again, atol=1e-11, rtol=0)


def test_a_triangle_is_half_of_the_matrix() -> None:
    C = torch.arange(9.0).view(3, 3)
    C = C + C.mT
    assert len(packed(C)) == 6 and torch.equal(unpacked(packed(C)), C)


def test_too_few_samples_for_no_ridge_are_named() -> None:
    X = torch.eye(2, 4, dtype=torch.float64)
    with pytest.raises(StrategyError, match=r"strategy\.ridge=0: .* rank 2 of 4"):
        ridge_solution(*moments(X, one_hot(torch.tensor([0, 1]), 2)), 0.0)
    with pytest.raises(TooFewUpdates, match="is none of any samples"):
        ridge_solution(-9 * torch.eye(2, dtype=torch.float64), X[:, :2], 1.0)


def test_dependent_features_are_told_from_rounding() -> None:
    """Of twelve samples in five dimensions of eight: Cholesky of the last digits would go through for some."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        X = drawn(12, 5, rng) @ drawn(5, 8, rng)
        with pytest.raises(StrategyError, match="rank 5 of 8"):
            ridge_solution(*moments(X, one_hot(torch.arange(12) % 3, 3)), 0.0)


@pytest.mark.parametrize(("n", "scale"), [(1, 1e4), (5, 1e4), (5, 1e8), (30, 1e8)])
def test_features_of_any_scale(n: int, scale: float) -> None:
    """Against the singular values of X, which hold twice the digits of those of X'X."""
    rng = torch.Generator().manual_seed(0)
    X, Y = scale * drawn(n, 8, rng), one_hot(torch.arange(n) % 3, 3)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    expected = Vh.mT @ ((S / (S * S + 1))[:, None] * (U.mT @ Y))
    atol = 1e-10 * float(expected.abs().max())
    gram, cross = moments(X, Y)
    torch.testing.assert_close(ridge_solution(gram, cross, 1.0), expected, rtol=0, atol=atol)
    sent = [solution(X[i::2], Y[i::2], 1.0) for i in range(min(n, 2))]
    found = ridge_solution(*joined(*zip(*sent, strict=True), 1.0), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    eps = torch.finfo(torch.float32).eps
    rough = ridge_solution(gram.float().double(), cross.float().double(), 1.0, eps)
    torch.testing.assert_close(rough, expected, rtol=0, atol=1e5 * atol)


def drawn(n: int, d: int, rng: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=rng, dtype=torch.float64)


def pooled(model: nn.Sequential | None = None) -> Tensor:
    """Weight and bias (C, d + 1) of the ridge solution over all samples, in plain torch."""
    problem = classification(**({"model": model} if model else {}))
    x = torch.cat([x for x, _ in problem.clients]).double()
    y = torch.cat([y for _, y in problem.clients])
    with torch.no_grad():
        h = problem.model.double()[:-1](x)
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    return torch.linalg.solve(h.mT @ h + torch.eye(h.shape[1]).double(), h.mT @ one_hot(y, 3)).mT


def head(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1)


@pytest.mark.parametrize("send", ["moments", "solution"])
def test_outputs_of_classes_that_nobody_has_are_0(send: str) -> None:
    """The head has five, the clients' samples three."""
    problem = classification(model=network("tanh", 4, 5))
    found = problem.run(*RUN, f"strategy.send={send}", "strategy.balance=none")
    assert not head(found.weights)[3:].any()
    problem = classification()
    with torch.no_grad():
        problem.model[0].load_state_dict({k[2:]: v for k, v in found.weights.items() if k[0] == "0"})
    torch.testing.assert_close(head(found.weights)[:3], pooled(problem.model), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("send", ["moments", "solution"])
def test_any_split_gives_the_pooled_solution(send: str) -> None:
    whole = classification()
    x, y = (torch.cat(part) for part in zip(*whole.clients, strict=True))
    splits = {
        "as given": whole.clients,
        "one each": [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))],
        "by class": [(x[y == c], y[y == c]) for c in range(3)],
    }
    for clients in splits.values():
        settings = [*whole.settings[:1], "clients_per_round=1"]
        found = classification(clients=clients, settings=settings).run(*RUN, f"strategy.send={send}")
        torch.testing.assert_close(head(found.weights), pooled(), rtol=1e-9, atol=1e-10)
        row = found.rows[0]
        assert row["clients_in"] == len(clients) and row["cohort"] == list(range(len(clients)))


def test_who_comes_late_is_added() -> None:
    problem = classification(cohorts=[[0, 1], [1, 2, 3], [], [4, 5], [0]])
    found = problem.run(*RUN, "rounds=5")
    assert [row.get("clients_in") for row in found.rows] == [2, 4, None, 6, None]
    torch.testing.assert_close(head(found.weights), pooled(), rtol=1e-9, atol=1e-10)
    once, twice = hashes(found)[-2:]
    assert once == twice


def test_who_comes_late_weighs_by_the_counts_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    classification(cohorts=[[0, 1], [2, 3]]).run(*RUN, "rounds=2", "strategy.balance=class")
    assert caplog.text.count("rows of clients 2, 3, who come late, weigh by the class counts") == 1


def test_balance_costs_an_exchange_and_weighs_classes_alike() -> None:
    problem = classification()
    found = problem.run(*RUN, "strategy.balance=class")
    assert found.rows[0]["class_counts"]["bytes_up"] > 0
    x, y = (torch.cat(part) for part in zip(*problem.clients, strict=True))
    with torch.no_grad():
        h = problem.model.double()[:-1](x.double())
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    share = (len(y) / (3 * torch.bincount(y).double()))[y][:, None]
    W = torch.linalg.solve(h.mT @ (share * h) + torch.eye(6).double(), h.mT @ (share * one_hot(y, 3)))
    torch.testing.assert_close(head(found.weights), W.mT, rtol=1e-9, atol=1e-10)
