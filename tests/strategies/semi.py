"""A client with labelled and unlabelled samples in float64, for steps that are computed again with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from composing import compose_quickly
from torch import Tensor, nn

from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.data import views
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Roles
from fedsim.data.shards import Shards
from fedsim.exchange.payload import Payload
from fedsim.local.job import Job
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

FEATURES, CLASSES = 4, 3
NOISE = ("view@views.strong=noise", "views.strong.sigma=0.3")
LABELLED = "data.labelled={at: client, share: 0.4}"


def tilted(x: Tensor, generator: Any) -> Tensor:
    """A strong view without chance."""
    return x.flip(1) * 0.5 + x * 0.75


def numbers(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples (n, d) and classes (n,)."""
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(n, FEATURES)), rng.integers(0, CLASSES, n)


def job(
    labelled: int,
    unlabelled: int,
    *settings: str,
    message: dict[str, Tensor] | None = None,
    told: bool = False,
    model: nn.Module | None = None,
) -> Job:
    """A client with so many samples of both kinds, the labelled ones first, a linear model and batches of 3 in
    order."""
    x, y = (torch.tensor(part) for part in numbers(labelled + unlabelled, 1))
    rows = np.arange(labelled + unlabelled)
    source = FederatedData(
        Dataset(Samples(x, y), classes=tuple("abc")),
        Shards.of([rows[:labelled]]),
        roles=Roles(unlabelled=Shards.of([rows[labelled:]]), labels_known=told),
    )
    torch.manual_seed(3)
    flat = FlatModel(model or nn.Linear(FEATURES, CLASSES), torch.float64)
    usual = ("client.batch_size=3", "client.epochs=2", "client.shuffle=false", "client.lr=0.2")
    sent = {"w": flat.w.clone(), **({"buffers": flat.buffers.clone()} if len(flat.buffers) else {})}
    return Job(
        client=0,
        round=0,
        task=Task(flat.module),
        model=flat,
        local=as_dataclass(compose_quickly([*usual, *settings]).client, ClientConfig),
        seed=0,
        message=Payload(sent | (message or {})),
        state={},
        source=source,
        views={"weak": views.Weak(), "strong": tilted},
    )


def weights(job: Job, w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (C, d) and bias (C,) of a vector of the linear model."""
    named = job.layout.named(w)
    return named["weight"].numpy().copy(), named["bias"].numpy().copy()


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def parts(x: np.ndarray, size: int = 3) -> list[np.ndarray]:
    """Batches in order, the last one short."""
    return [x[i : i + size] for i in range(0, len(x), size)]
