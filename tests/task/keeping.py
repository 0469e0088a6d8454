"""Layers that keep something from call to call, each in another way."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Keeps(nn.Module):
    """A layer whose output is scaled by what ``remember`` gives, which changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.prepare()

    def prepare(self) -> None:
        pass

    def remember(self, x: Tensor) -> Any:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.remember(x)


class HiddenState(Keeps):
    def prepare(self) -> None:
        self.h: Tensor | None = None

    def remember(self, x: Tensor) -> Any:
        self.h = x.mean() if self.h is None else 0.5 * self.h + x.mean()
        return self.h


class HiddenWithGraph(Keeps):
    def remember(self, x: Tensor) -> Any:
        before = self.__dict__.get("h", torch.ones(()))
        self.h = self.body.weight.mean() + before.detach()
        return self.h


class Queue(Keeps):
    def prepare(self) -> None:
        self.queue: deque[float] = deque([0.5], maxlen=3)

    def remember(self, x: Tensor) -> Any:
        self.queue.append(float(x.mean()))
        return 1 + sum(self.queue)


class Nested(Keeps):
    def prepare(self) -> None:
        self.state: dict[str, list[Any]] = {"seen": [[0.5]]}

    def remember(self, x: Tensor) -> Any:
        self.state["seen"][0].append(float(x.mean()))
        self.state["last"] = [1.0]
        return 1 + sum(self.state["seen"][0])


class Cache(Keeps):
    """A mask that is made once, at the first batch."""

    def prepare(self) -> None:
        self.cache: dict[int, Tensor] = {}

    def remember(self, x: Tensor) -> Any:
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = (x[0] > 0).double().mean()
        return 1 + self.cache[x.shape[1]]


class InPlace(Keeps):
    def prepare(self) -> None:
        self.h = torch.ones(3)

    def remember(self, x: Tensor) -> Any:
        self.h.mul_(0.5).add_(x.mean())
        return self.h.clone()


class BehindTorch(Keeps):
    """Written to where torch counts no change."""

    def prepare(self) -> None:
        self.h = torch.ones(3)

    def remember(self, x: Tensor) -> Any:
        self.h.data.mul_(0.5).add_(x.mean())
        return self.h.clone()


class Large(Keeps):
    def prepare(self) -> None:
        self.h = torch.ones(1 << 17)

    def remember(self, x: Tensor) -> Any:
        self.h.mul_(0.5).add_(x.mean())
        return self.h[:3].clone()


class Array(Keeps):
    def prepare(self) -> None:
        self.h = np.ones(3)

    def remember(self, x: Tensor) -> Any:
        self.h *= 0.5 + abs(float(x.mean()))
        return torch.from_numpy(self.h.copy())


class Draws(Keeps):
    def prepare(self) -> None:
        self.generators = [random.Random(0), np.random.RandomState(0), np.random.default_rng(0)]
        self.torchs = torch.Generator().manual_seed(0)

    def remember(self, x: Tensor) -> Any:
        drawn = [g.random() for g in self.generators]
        return 1 + sum(drawn) + torch.rand((), generator=self.torchs)


class Helper:
    def __init__(self) -> None:
        self.calls, self.seen = 0, set[int]()


class ObjectOfItsOwn(Keeps):
    def prepare(self) -> None:
        self.helper = Helper()

    def remember(self, x: Tensor) -> Any:
        self.helper.calls += 1
        self.helper.seen.add(self.helper.calls)
        return self.helper.calls + len(self.helper.seen)


class OtherLayer(Keeps):
    """A schedule that changes a layer of torch's own."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm1d(3)

    def remember(self, x: Tensor) -> Any:
        self.norm.eps *= 2
        return self.norm(self.body(x)) * self.norm.eps * 1e4


class Hooked(Keeps):
    def prepare(self) -> None:
        self.body.register_forward_hook(Counts())

    def remember(self, x: Tensor) -> Any:
        return 1


class Counts:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * self.calls


class NotSaved(Keeps):
    def prepare(self) -> None:
        self.register_buffer("h", torch.zeros(3), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def remember(self, x: Tensor) -> Any:
        self.h, self.calls = self.h + x.mean(), self.calls + 1
        return 1 + self.h * self.calls


class Replaced(Keeps):
    """A float buffer that is another tensor after each call, in evaluation too."""

    def prepare(self) -> None:
        self.register_buffer("h", torch.zeros(3))

    def remember(self, x: Tensor) -> Any:
        self.h = self.h + x.mean()
        return 1 + self.h


class Switching(Keeps):
    """Folds a value of its weights into an attribute when it is evaluated."""

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        self.folded = None if mode else self.body.weight.detach().mean()
        return self

    def remember(self, x: Tensor) -> Any:
        return 1 if self.folded is None else 1 + self.folded


class Ordered(Keeps):
    def prepare(self) -> None:
        self.seen = OrderedDict(first=0.5)

    def remember(self, x: Tensor) -> Any:
        self.seen["last"] = float(x.mean()) + self.seen.get("last", 0.0)
        self.seen.move_to_end("first")
        return 1 + sum(self.seen.values())


class Seldom(Keeps):
    """Changes layers of torch's own for batches that a trial of two samples does not have."""

    def prepare(self) -> None:
        self.norm, self.tail = nn.BatchNorm1d(3), nn.Sequential(nn.Identity())

    def remember(self, x: Tensor) -> Any:
        out = 1 + self.tail(self.norm(self.body(x)))
        if len(x) > 2 and float(x.mean()) > 0:
            self.norm.eval()
            self.tail.append(nn.Tanh())
            self.body.register_forward_hook(lambda layer, given, output: output * 0.5)
        return out


KINDS = [
    HiddenState, HiddenWithGraph, Queue, Nested, Cache, InPlace, BehindTorch, Large, Array, Draws, ObjectOfItsOwn,
    OtherLayer, Hooked, NotSaved, Replaced, Switching, Ordered, Seldom,
]  # fmt: skip
