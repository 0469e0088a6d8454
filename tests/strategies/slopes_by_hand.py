"""Softmax regression, codecs and directions in plain NumPy: what runs of methods of slopes are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from problems import Pair, Problem, classes
from torch import nn

P = 15  # 4 features, 3 classes
EPS = 1e-3
SETTINGS = ("dtype=float64", "client.batch_size=20", "client.shuffle=false", "client.epochs=1")


def problem(cohorts: Sequence[Sequence[int]], sizes: Sequence[int] = (5, 6, 4), *settings: str) -> Problem:
    """Clients whose only mini-batch is all that they have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
    more = (f"rounds={len(cohorts)}", *SETTINGS, *settings)
    return Problem(model, classes(sizes), more, cohorts=[list(c) for c in cohorts])


def start(p: Problem) -> np.ndarray:
    assert isinstance(p.model, nn.Module)
    return np.concatenate([t.detach().double().numpy().ravel() for t in p.model.parameters()])


def flat(weights: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([weights["weight"].numpy().ravel(), weights["bias"].numpy()])


def loss(theta: np.ndarray, pair: Pair) -> float:
    """Mean cross entropy."""
    x, y = pair[0].double().numpy(), pair[1].numpy()
    logits = x @ theta[:12].reshape(3, 4).T + theta[12:]
    top = logits.max(axis=1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return float(-log[np.arange(len(y)), y].mean())


def slope(theta: np.ndarray, z: np.ndarray, pair: Pair) -> float:
    """Central difference."""
    return (loss(theta + EPS * z, pair) - loss(theta - EPS * z, pair)) / (2 * EPS)


def z(scope: str, t: int, a: int, b: int, seed: int = 0) -> np.ndarray:
    """The direction of that name, drawn from its key."""
    digest = blake2b(f"{seed}/directions/{scope}".encode(), digest_size=8).digest()
    key, counter = int.from_bytes(digest, "little"), np.array([0, b, a, t], np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return draws.standard_normal(P, dtype=np.float32).astype(np.float64)


def byte(g: float) -> float:
    """What log8 makes of a slope."""
    if g == 0:
        return 0.0
    k = min(max(round(8 * np.log(abs(g))) + 64, 1), 127)
    return float(np.sign(g) * np.exp((k - 64) / 8))


def single(g: float) -> float:
    """What float32 makes of it."""
    return float(np.float32(g))


Codec = Callable[[float], float]
