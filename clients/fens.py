"""FENS: what learns, at the clients, how to put together everybody's models. Allouah, Dhasade, Guerraoui, et al.:
Revisiting Ensembling in One-Shot Federated Learning, NeurIPS 2024.

Logits ``z`` (K, B, C) of K models. The aggregator ``weights`` is ``h(x)_c = sum_k theta_kc f_k(x)_c + b_c``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

KINDS = ("weights", "linear", "mlp")
UNITS = 32  # of the hidden layer


def fens_logits(z: Tensor, theta: Tensor, b: Tensor) -> Tensor:
    """``h`` (B, C) of logits ``z`` (K, B, C), ``theta`` (K, C), ``b`` (C,)."""
    return (z * theta[:, None]).sum(dim=0) + b


def fens_gradient(z: Tensor, y: Tensor, theta: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean cross entropy: ``dL/dtheta_kc = sum_b r_bc z_kbc``, ``dL/db = sum_b r_b``, ``r = (softmax(h) -
    onehot(y))/B``."""
    h = fens_logits(z, theta, b)
    r = (h.softmax(dim=1) - F.one_hot(y, h.shape[1]).to(h.dtype)) / len(y)
    return torch.einsum("bc,kbc->kc", r, z), r.sum(dim=0)


class Weighing(nn.Module):
    """The aggregator ``weights``; starts as the mean of logits."""

    def __init__(self, models: int, classes: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((models, classes), 1 / models))
        self.b = nn.Parameter(torch.zeros(classes))

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, C) of ``z`` (K, B, C)."""
        return fens_logits(z, self.theta, self.b)


class Stacking(nn.Module):
    """``linear``: one layer on the models' logits side by side; ``mlp``: a hidden layer of 32 units, on ``z / K``."""

    def __init__(self, models: int, classes: int, hidden: bool) -> None:
        super().__init__()
        wide, self.models = models * classes, models if hidden else 1
        self.net: nn.Module = nn.Linear(wide, classes)
        if hidden:
            self.net = nn.Sequential(nn.Linear(wide, UNITS), nn.ReLU(), nn.Linear(UNITS, classes))

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, C) of ``z`` (K, B, C)."""
        out: Tensor = self.net((z / self.models).transpose(0, 1).flatten(1))
        return out


def aggregator(kind: str, models: int, classes: int, seed: int, dtype: torch.dtype) -> nn.Module:
    """A fresh one, drawn by ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = Weighing(models, classes) if kind == "weights" else Stacking(models, classes, kind == "mlp")
    return made.to(dtype)


def vector_of(module: nn.Module) -> Tensor:
    """Its parameters as one vector."""
    return parameters_to_vector(module.parameters()).detach().clone()


def with_vector(module: nn.Module, h: Tensor) -> nn.Module:
    """``module`` with parameters ``h``."""
    vector_to_parameters(h.clone(), module.parameters())
    return module
