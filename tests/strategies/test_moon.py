"""MOON's frozen models and the beginning of its contrast, against plain torch written from eq. 3."""

from __future__ import annotations

import pytest
import torch
from problems import Network, classes, classification, recorded
from torch import Tensor, nn
from torch.nn import functional as F

SETTINGS = ("client.steps=1", "client.batch_size=8", "client.shuffle=false", "dtype=float64", "strategy.mu=5")


class Doubling(nn.Module):
    """Tells the modes apart, as dropout does, but draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


def two_faced() -> nn.Module:
    """Features by BatchNorm and a layer that depend on the mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Network(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), Doubling(), nn.Linear(5, 3))


def loaded(w: Tensor, buffers: Tensor | None = None) -> nn.Module:
    """The model of a flat vector without padding, with BatchNorm statistics ``buffers`` (mean, variance)."""
    model = two_faced().double()
    nn.utils.vector_to_parameters(w, model.parameters())
    if buffers is not None:
        model[1].running_mean.copy_(buffers[:5])  # type: ignore[index, union-attr, operator]
        model[1].running_var.copy_(buffers[5:])  # type: ignore[index, union-attr, operator]
    return model


def stepped(w: Tensor, buffers: Tensor, x: Tensor, y: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """One step of 0.1 on the joint loss, in training mode."""
    model = loaded(w, buffers)
    z = model.features(x)  # type: ignore[operator]
    s, p = F.cosine_similarity(z, near) / 0.5, F.cosine_similarity(z, far) / 0.5
    loss = F.cross_entropy(model.head(z), y) - 5 * (s - torch.logaddexp(s, p)).mean()  # type: ignore[operator]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return w - 0.1 * torch.cat([g.reshape(-1) for g in grads])


def test_the_frozen_models_run_in_evaluation_mode_with_their_own_statistics() -> None:
    """Running statistics of the received model and, for the previous one, those it ended its turn with."""
    problem = classification(model=two_faced(), cohorts=[[0, 1], [0]], clients=classes((8, 8)))
    run, _ = recorded("moon", problem, "rounds=2", *SETTINGS)
    (x, y), start = problem.clients[0], run.states[0]
    x, kept = x.double(), run.kept[0][0]
    first = loaded(nn.utils.parameters_to_vector(two_faced().double().parameters()))
    first.features(x)  # type: ignore[operator]  # one batch in training: its statistics
    torch.testing.assert_close(kept["last/buffers"][:5], first[1].running_mean, rtol=0, atol=1e-12)  # type: ignore[index]
    with torch.no_grad():
        near = loaded(start["w"], start["buffers"]).eval().features(x)  # type: ignore[operator]
        far = loaded(kept["last"], kept["last/buffers"]).eval().features(x)  # type: ignore[operator]
    expected = stepped(start["w"], start["buffers"], x, y, near, far)
    torch.testing.assert_close(run.states[1]["w"], expected, rtol=0, atol=1e-12)
    ended = loaded(start["w"], start["buffers"])
    ended.features(x)  # type: ignore[operator]  # the frozen passes leave no trace in the trained model's statistics
    torch.testing.assert_close(run.states[1]["buffers"][:5], ended[1].running_mean, rtol=0, atol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("contrast", ["turn", "round"])
def test_the_contrast_of_a_newcomer(contrast: str) -> None:
    """Client 1 first trains in round 1: no contrast yet, or one with the run's initial model."""
    problem = classification(model=two_faced(), cohorts=[[0], [1]], clients=classes((8, 8)))
    run, result = recorded("moon", problem, "rounds=2", f"strategy.contrast={contrast}", *SETTINGS)
    (x, y), start = problem.clients[1], run.states[0]
    x, initial = x.double(), two_faced().double().eval()
    with torch.no_grad():
        near = loaded(start["w"], start["buffers"]).eval().features(x)  # type: ignore[operator]
        far = initial.features(x) if contrast == "round" else near  # type: ignore[operator]
    if contrast == "round":
        expected = stepped(start["w"], start["buffers"], x, y, near, far)
    else:
        model = loaded(start["w"], start["buffers"])
        loss = F.cross_entropy(model.head(model.features(x)), y)  # type: ignore[operator]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected = start["w"] - 0.1 * torch.cat([g.reshape(-1) for g in grads])
    torch.testing.assert_close(run.states[1]["w"], expected, rtol=0, atol=1e-12)
    down = [row["bytes_down"] for row in result.rows]
    assert down[1] == down[0] * (2 if contrast == "round" else 1)
