"""Where the server works with whole models: copies to compute with, samples as they are read, what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsim.data.dataset import Dataset
from fedsim.data.local import Batch
from fedsim.data.trees import tree_map
from fedsim.engine.assignments import Plan
from fedsim.rng import key, seed_global, undisturbed
from fedsim.task.copies import copied
from fedsim.task.problems import logits_of
from fedsim.task.threads import threads
from fedsim.task.vectors import FlatModel, Weights

T = TypeVar("T")


class Workshop:
    """Models that a strategy computes with in the server's own process, and each worker for it (``Server.spread``); the
    same bits on any engine."""

    def __init__(self, plan: Plan, data: Dataset):
        """``data``: of the clients, for how they are read; no sample of theirs is."""
        self._plan, self._kept = plan, dict[str, Any]()
        self.pictures: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # images that were made and their labels, to be drawn
        self.device, self.dtype = plan.device, plan.dtype
        self.shape, self.num_classes = data.input_shape, data.num_classes
        self._augment = data.augment
        self._normalize = None if data.normalize is None else replace(data.normalize, scale=1.0)

    @contextmanager
    def at_work(self, purpose: str, *numbers: int) -> Iterator[None]:
        """Inside, torch has the run's threads, and what layers draw is keyed by ``purpose`` and ``numbers``."""
        with threads(self._plan.threads):
            seed_global(key(self._plan.seed, f"server/{purpose}/layers", *numbers))
            yield

    @cached_property
    def student(self) -> FlatModel:
        """A resident model to train, in training mode; whoever uses it loads weights first."""
        return self._flat()

    @cached_property
    def outputs(self) -> int:
        """Logits C that the model gives of a sample: one for each class, or more."""
        task, model = self._plan.task, self._flat().module.eval()
        if task.example is None:
            return self.num_classes
        x = tree_map(lambda t: t.to(self.device, self.dtype if t.is_floating_point() else None), task.example)
        with undisturbed(), torch.no_grad():
            return int(self.logits(model, x).shape[1])

    def student_of(self, architecture: int) -> FlatModel:
        """The same of another ``architecture``, by its number."""
        return (
            self.kept(f"student/{architecture}", lambda: self._flat(architecture))
            if architecture
            else self.student
        )

    def frozen(self, weights: Weights, architecture: int = 0) -> nn.Module:
        """A copy of the model (by its number, of another ``architecture``) with ``weights`` in evaluation mode, none of
        which has a gradient."""
        model = self._flat(architecture)
        model.load(weights.w.to(self.device), weights.buffers.to(self.device))
        return model.module.eval().requires_grad_(False)

    def logits(self, module: nn.Module, x: Any) -> Tensor:
        """Logits (B, C) of a batch."""
        found: Tensor = logits_of(self._plan.task.output(module, x))
        return found

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gave when something of this ``name`` was first asked for."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def shown(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Samples ``x`` (B, ...) in [0, 1] as a model gets the clients', with gradient; augmented as those in training
        if ``rng`` is given."""
        if rng is not None and self._augment is not None:
            x = self._augment(x, rng)
        if self._normalize is None:
            return x.to(self.dtype)
        mean, std = (_by_channel(v, x) for v in (self._normalize.mean, self._normalize.std))
        return (x.to(self.dtype) - mean) / std

    def moved(self, batch: Batch) -> Batch:
        """A batch on the device."""
        return Batch(*(tree_map(lambda t: t.to(self.device), part) for part in (batch.x, batch.y)))

    def _flat(self, architecture: int = 0) -> FlatModel:
        plan = self._plan
        task = plan.others[architecture - 1] if architecture else plan.task
        return FlatModel(copied(task.model), plan.dtype, plan.device, habits=task.habits, loss=task.loss)


@dataclass(frozen=True)
class Computation:
    """What a strategy has computed item by item, in whichever process: see ``Server.spread``."""

    compute: Callable[[Workshop, Any, Any], Any]
    purpose: str
    numbers: tuple[int, ...]
    standing: Any = None  # ``given``: sent again only when it is another object

    def of(self, shop: Workshop, item: tuple[int, Any]) -> Any:
        """The result for an item with its place; generators are left as they were."""
        place, value = item
        with undisturbed(), shop.at_work(self.purpose, *self.numbers, place):
            return self.compute(shop, self.standing, value)


def _by_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    shape = (1, -1) + (1,) * (x.dim() - 2) if len(values) > 1 else (1,) * x.dim()
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(shape)
