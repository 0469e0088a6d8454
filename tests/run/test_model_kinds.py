"""Models that a plain loop trains: the same numbers here, or one line before round 1 that names the layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fedsim
from fedsim.errors import ConfigError

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


def head() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(6, 3))


def norm_of_old(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), head())
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


class Tied(nn.Module):
    """A parameter and a buffer registered twice, and weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.zeros(4))
        self.o.register_buffer("mean", self.mean)
        self.scales = nn.ParameterList([torch.ones(4), torch.full((4,), 2.0)])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0))
        for scale in self.scales:
            x = torch.tanh(self.b(self.a(x))) * scale
        return self.o(x - self.o.mean)


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale.exp()


class Bag(nn.Module):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table, self.o = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.table(x).mean(1))


class Versioned(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Counting(nn.Module):
    """Integer and bool buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return self.body(x * self.mask)


class RunningMean(nn.Module):
    """A float buffer, replaced by another tensor in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return self.body(x - self.mean)


class MaxNorm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class Inside(nn.Module):
    """A module that bounds the weights of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.body.weight.data = self.body.weight.data.clamp(-0.2, 0.2)
        return self.body(x)


TRAINED: dict[str, Build] = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), head()),
    "older weight_norm": lambda: nn.Sequential(norm_of_old(nn.Linear(4, 6)), head()),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6), use_trivialization=False), head()),
    "pruned": pruned,
    "tied": Tied,
    "no dimensions": Scaled,
    "extra state": lambda: nn.Sequential(Versioned(4, 6), head()),
    "integer and bool": Counting,
    "buffer replaced": RunningMean,
    "weights replaced": lambda: MaxNorm(4, 3),
    "weights replaced inside": Inside,
    "bfloat16": lambda: nn.Sequential(nn.Linear(4, 6), head()).bfloat16(),
    "two types": lambda: nn.Sequential(nn.Linear(4, 6).half(), head()),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_as_by_a_plain_loop(kind: str) -> None:
    model = seeded(TRAINED[kind])
    if kind == "orthogonal":
        model = nn.Sequential(nn.Linear(4, 6), *model)
    expected = plain_loop(copy_of(model), samples())
    found = simulated(model).weights
    assert {k for k, v in expected.items() if isinstance(v, Tensor)} == set(found)
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
        elif name != "seen":  # counters start anew
            assert torch.equal(value, expected[name])


def copy_of(model: nn.Module) -> nn.Module:
    from fedsim.task.copies import copyable

    return copy.deepcopy(copyable(model))


def test_sparse_embedding_is_trained_as_a_dense_one() -> None:
    expected = plain_loop(seeded(lambda: Bag(sparse=False)), looked_up())
    for strategy in ("fedavg", "fedprox"):
        found = simulated(seeded(Bag), f"strategy={strategy}", data=[looked_up()]).weights
        if strategy == "fedavg":
            torch.testing.assert_close(dict(found), dict(expected), rtol=1e-12, atol=1e-12)
