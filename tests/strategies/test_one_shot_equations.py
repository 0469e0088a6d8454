"""Equations of one-shot methods against independent numbers and float64 forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import GOLDEN
from torch import Tensor

from strategies.distilling import Adam, Momentum, clipped
from strategies.ensembles import (
    adversarial_loss,
    cosine,
    direction,
    disagreement,
    disagreement_loss,
    ensemble,
    entropy,
    hard_loss,
    hardness,
    kl,
    majority,
    mean_probabilities,
    perturbed,
    soft_loss,
    usable,
    weight_gradient,
    weight_step,
)

K, B, C = 4, 6, 3


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "oneshot.npz") as z:
        return dict(z)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Logits f (K, B, C), weights w (K,), labels y (B,)."""
    return drawn(K, B, C), torch.tensor([0.1, 0.7, 0.0, 0.4], dtype=torch.float64), torch.arange(B) % C


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_the_losses_of_feddf_and_dense_are_golden() -> None:
    z = golden()
    f, s, y = torch.tensor(z["Z"]), torch.tensor(z["student"]), torch.tensor(z["y"])
    a = ensemble(f, torch.ones(len(f)))
    for name, T in (("T1", 1.0), ("T3", 3.0)):
        own = s.clone().requires_grad_()
        loss = soft_loss(a, own, T)
        assert loss.item() == pytest.approx(float(z[f"feddf_loss_{name}"]), abs=1e-10)
        (g,) = torch.autograd.grad(loss, own)
        np.testing.assert_allclose(g.numpy(), z[f"feddf_grad_{name}"], atol=1e-10)
    plain = torch.nn.functional.cross_entropy(a, y)
    assert float(plain) == pytest.approx(float(z["dense_oh"]), abs=1e-10)
    assert float(disagreement_loss(a, s)) == pytest.approx(float(z["dense_adv"]), abs=1e-10)
    assert float(plain + disagreement_loss(a, s)) == pytest.approx(float(z["dense_sum"]), abs=1e-10)
    assert disagreement(a, s).tolist() == z["dense_omega"].tolist()


def test_where_all_agree_dense_has_neither_loss_nor_gradient() -> None:
    a = drawn(B, C)
    s = (2 * a).requires_grad_()
    loss = disagreement_loss(a, s)
    assert loss.item() == 0 and not torch.autograd.grad(loss, s)[0].any()


def test_the_ensemble_and_its_losses_in_numpy(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    f, w, y = problem
    a = ensemble(f, w)
    expected = np.einsum("k,kbc->bc", w, f) / float(w.sum())
    np.testing.assert_allclose(a, expected, atol=1e-14)
    p, rows = softmax(expected), np.arange(B)
    d = (1 - p[rows, y]) ** 1.5
    np.testing.assert_allclose(hardness(a, y, 1.5), d, atol=1e-14)
    assert float(hard_loss(a, y, 1.5)) == pytest.approx(float((d * -np.log(p[rows, y])).mean()), abs=1e-14)
    s, T = drawn(B, C, seed=1), 3.0
    p, q = softmax(expected / T), softmax(s.numpy() / T)
    divergence = float((p * np.log(p / q)).sum(axis=1).mean())
    assert float(kl(a, s, T)) == pytest.approx(9 * divergence, abs=1e-13)
    assert float(adversarial_loss(a, s, T)) == pytest.approx(-9 * divergence, abs=1e-13)


def test_hardness_carries_no_gradient(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    f, w, y = problem
    a = ensemble(f, w).requires_grad_()
    (g,) = torch.autograd.grad(hard_loss(a, y, 2.0), a)
    d = hardness(a, y, 2.0)
    expected = d[:, None] * (a.softmax(1) - torch.nn.functional.one_hot(y, C)) / B
    torch.testing.assert_close(g, expected.detach(), atol=1e-14, rtol=0)


def test_the_gradient_of_the_weights(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    f, w, y = problem
    own = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(ensemble(f, own), y), own)
    g = weight_gradient(f, w, y)
    torch.testing.assert_close(g, expected, atol=1e-14, rtol=0)
    assert abs(float(g @ w)) < 1e-14  # the length of w does not matter
    single = weight_gradient(f[:1], w[:1], y)
    assert abs(float(single)) < 1e-15


def test_weights_stay_within_their_bounds() -> None:
    w = torch.tensor([0.05, 0.98, 0.5], dtype=torch.float64)
    g = torch.tensor([2.0, -0.1, 0.0], dtype=torch.float64)
    assert weight_step(w, g, 0.1, w).tolist() == [0.0, 1.0, 0.5]
    assert usable(torch.zeros(4, dtype=torch.float64))[0].tolist() == [0.25] * 4
    assert usable(w) == (w, False)
    assert entropy(torch.ones(4)) == pytest.approx(math.log(4)) and entropy(torch.eye(3)[0]) == 0


def test_perturbing_along_a_random_direction(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _, w, _ = problem
    matrices, x, u = drawn(K, C, 5, seed=2), drawn(B, 5, seed=3).requires_grad_(), drawn(B, C, seed=4)
    g = direction(ensemble(torch.einsum("kcd,bd->kbc", matrices, x), w), u, 4.0, x)
    mean = np.einsum("k,kcd->cd", w, matrices) / float(w.sum())
    p = softmax(x.detach().numpy() @ mean.T / 4)
    expected = (p * (u.numpy() - (p * u.numpy()).sum(axis=1, keepdims=True))) @ mean / 4
    np.testing.assert_allclose(g, expected, atol=1e-14)
    moved = perturbed(x.detach(), g, 0.1) - x.detach()
    np.testing.assert_allclose(moved, 0.1 * np.sign(expected), atol=1e-14)
    long = perturbed(x.detach(), g, 0.1, "l2") - x.detach()
    torch.testing.assert_close(long.norm(dim=1), torch.full((B,), 0.1, dtype=torch.float64))


def test_means_of_probabilities_and_votes() -> None:
    f = torch.tensor([[[2.0, 0, 0]], [[0, 1, 0]], [[0, 0, 3.0]], [[0, 0.5, 0]]], dtype=torch.float64)
    p = f.softmax(2).mean(0)
    torch.testing.assert_close(mean_probabilities(f).softmax(1), p)
    assert majority(f).tolist() == [[1, 2, 1]]
    tie = majority(f[:2])
    assert tie.argmax(1).tolist() == [0]


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_the_students_optimisers_are_torchs(rule: str) -> None:
    w, g = drawn(5), [drawn(5, seed=i) for i in range(1, 5)]
    mine, theirs = w.clone(), w.clone().requires_grad_()
    own: Momentum | Adam
    if rule == "momentum":
        own = Momentum(torch.zeros(5, dtype=torch.float64), 0.1, 0.9, 0.01)
        other = torch.optim.SGD([theirs], 0.1, 0.9, weight_decay=0.01)
    else:
        own = Adam(torch.zeros_like(w), torch.zeros_like(w), lambda t: 0.1)
        other = torch.optim.Adam([theirs], 0.1)
    for step in g:
        own(mine, step)
        theirs.grad = step.clone()
        other.step()
    torch.testing.assert_close(mine, theirs.detach(), atol=1e-14, rtol=1e-12)


def test_rates_and_bounds() -> None:
    assert cosine(0.2, 0, 10) == 0.2 and cosine(0.2, 5, 10) == pytest.approx(0.1)
    assert cosine(0.2, 10, 10) == pytest.approx(0, abs=1e-17)
    assert float(clipped(torch.tensor([3.0, 4.0]), 1).norm()) == pytest.approx(1)
    assert clipped(torch.tensor([3.0, 4.0]), 10).tolist() == [3, 4]
