"""Little models, one full batch a round by torch's own SGD, and the same by fedsim: one client, no clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim

Build = Callable[[], nn.Module]
LR, DECAY, ROUNDS = 0.1, 0.01, 3


def samples(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def looked_up() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 10, (12, 5), generator=g), torch.randint(0, 3, (12,), generator=g)


def seeded(build: Build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build()


def simulated(model: nn.Module, *overrides: str, data: Any = None, **given: Any) -> fedsim.RunResult:
    settings = (
        "engine=serial",
        *QUIET,
        "dtype=float64",
        f"rounds={ROUNDS}",
        "clients_per_round=1",
        "client.epochs=1",
        f"client.lr={LR}",
        "client.batch_size=12",
        f"client.weight_decay={DECAY}",
        "client.clip_norm=null",
        "client.lr_decay=1.0",
        "client.shuffle=false",
        *overrides,
    )
    return fedsim.simulate(settings, model=model, clients=data or [samples()], **given)


def plain_loop(model: nn.Module, data: tuple[Tensor, Tensor], momentum: float = 0.0) -> dict[str, Tensor]:
    """One full batch a round, by torch's own SGD."""
    model = model.double()
    x, y = data
    opt = torch.optim.SGD(model.parameters(), LR, momentum=momentum, weight_decay=DECAY)
    for _ in range(ROUNDS):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model.state_dict()
