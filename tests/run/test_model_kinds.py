"""Models that a plain loop trains: the same numbers here."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from plainloop import Build, looked_up, plain_loop, samples, seeded, simulated
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fedsim.task.copies import copyable


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

    def double(self) -> Tied:
        """In float64, tied as before: torch's own unties buffers."""
        super().double()
        self.o.mean = self.mean
        return self

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
    def get_extra_state(self) -> object:
        return {"version": 1}

    def set_extra_state(self, state: object) -> None:
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


class Moved(RunningMean):
    """A float buffer that is pointed at other memory in each pass, as is one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data = 0.5 * self.mean + 0.5 * x.mean(0)
            self.norm.running_mean.data = 0.5 * self.norm.running_mean + 0.5 * x.mean(0)
        return self.body(x - self.mean - self.norm.running_mean)


class Beside(nn.Module):
    """Buffers written in place while BatchNorm's and others wait for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) * self.scale
        if self.training:
            self.mean.mul_(0.5).add_(0.5 * h.detach().mean(0))
        return self.body(h - self.mean.clone())


class Swapping(nn.Module):
    """Two buffers that take each other's place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("a", torch.zeros(4))
        self.register_buffer("b", torch.ones(4))
        self.register_buffer("c", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.a, self.b = self.b, self.a
            self.b.data, self.c.data = self.c.data, self.b.data
        return self.body(x + self.a - self.c * self.b)


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
    "orthogonal": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(6, 6), use_trivialization=False), head()
    ),
    "pruned": pruned,
    "tied": Tied,
    "no dimensions": Scaled,
    "extra state": lambda: nn.Sequential(Versioned(4, 6), head()),
    "integer and bool": Counting,
    "buffer replaced": RunningMean,
    "buffer's memory replaced": Moved,
    "buffers swapped": Swapping,
    "buffer beside BatchNorm": Beside,
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
        elif name not in ("seen", "norm.num_batches_tracked"):  # counters start anew
            assert torch.equal(value, expected[name])


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(copyable(model))


def test_sparse_embedding_is_trained_as_a_dense_one() -> None:
    expected = plain_loop(seeded(lambda: Bag(sparse=False)), looked_up())
    found = simulated(seeded(Bag), data=[looked_up()]).weights
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-12, atol=1e-12)
    again = simulated(
        seeded(Bag), "strategy=fedprox", "strategy.mu=0.0", data=[looked_up()]
    ).weights  # flat gradients
    torch.testing.assert_close(dict(again), dict(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_scripted_models_are_trained_without_a_word(kind: str) -> None:
    plain = seeded(lambda: nn.Linear(4, 3))
    made = torch.jit.script(plain) if kind == "script" else torch.jit.trace(plain, torch.zeros(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = simulated(made, "rounds=2", data=[samples()])
    expected = simulated(plain, "rounds=2", data=[samples()])
    assert found.rows[-1]["weights_hash"] == expected.rows[-1]["weights_hash"]
