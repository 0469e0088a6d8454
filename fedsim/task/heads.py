"""Linear heads inside and beside a flat vector: for methods that swap, keep or add classifiers over shared features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedsim.errors import ConfigError
from fedsim.models.split import features_of, head_of, logits_of, named_head, splits
from fedsim.rng import torch_rng
from fedsim.task.layout import Layout, Slot
from fedsim.task.task import Task


class Head(NamedTuple):
    """A linear classifier: ``weight`` (C, d) and ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """Logits (n, C) of features ``h`` (n, d)."""
        return h @ self.weight.T + self.bias

    def __add__(self, other: Any) -> Head:
        """The head whose logits are the sum of both."""
        return Head(self.weight + other.weight, self.bias + other.bias)

    def only(self, allowed: Tensor) -> Head:
        """The head that names none but the ``allowed`` classes (C,) bool: the logits of others are minus infinity."""
        weight = self.weight.masked_fill(~allowed[:, None], 0)
        return Head(weight, self.bias.masked_fill(~allowed, -torch.inf))


@dataclass(frozen=True)
class HeadSlots:
    """Where ``model.head``, a linear layer, lies in the flat vector; its bias may be missing."""

    weight: Slot
    bias: Slot | None

    @staticmethod
    def of(layout: Layout) -> HeadSlots:
        """Find it.

        Raises:
            ConfigError: if the model has no linear ``head``.
        """
        slots = [s for s in layout.params if s.name in layout.head]
        weight = [s for s in slots if len(s.shape) == 2]
        bias = [s for s in slots if len(s.shape) == 1]
        if len(weight) != 1 or len(bias) > 1 or len(weight) + len(bias) != len(slots):
            raise ConfigError(
                "model: this method needs model.features(x) -> (B, d) and a linear model.head; "
                f"found {', '.join(s.name for s in slots) or 'no head'}"
            )
        return HeadSlots(weight[0], bias[0] if bias else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, d)."""
        classes, dim = self.weight.shape
        return classes, dim

    @property
    def numel(self) -> int:
        """Entries of a head with bias, C (d + 1)."""
        return self.shape[0] * (self.shape[1] + 1)

    def of_model(self, w: Tensor) -> Head:
        """The head inside a model's vector ``w`` (d,), views; without a bias there, zeros."""
        bias = w[self.bias.span] if self.bias else w.new_zeros(self.shape[0])
        return Head(w[self.weight.span].view(self.shape), bias)

    def of_vector(self, v: Tensor) -> Head:
        """The head that ``v`` (C (d + 1),) holds alone, views."""
        classes, dim = self.shape
        return Head(v[: classes * dim].view(classes, dim), v[classes * dim :])

    def put(self, w: Tensor, head: Head) -> Tensor:
        """A copy of ``w`` (d,) with ``head`` in it; a bias that has no place is left out."""
        out = w.clone()
        out[self.weight.span] = head.weight.reshape(-1).to(w)
        if self.bias:
            out[self.bias.span] = head.bias.to(w)
        return out

    def fresh(self, seed: int, purpose: str, client: int) -> Tensor:
        """A head (C (d + 1),) drawn as torch draws linear layers, U(-1/sqrt d, 1/sqrt d), for one client."""
        bound = 1 / math.sqrt(self.shape[1])
        draw: Tensor = torch.rand(self.numel, generator=torch_rng(seed, purpose, client), dtype=torch.float64)
        return bound * (2 * draw - 1)


def with_head(model: nn.Module, slots: HeadSlots, head: Head) -> nn.Module:
    """``model``, itself, with ``head`` in the place of its own, which gets a bias if it has none."""
    name = slots.weight.name.rpartition(".")[0]
    classes, dim = slots.shape
    own = model.get_submodule(name)
    kind = next(own.parameters()).dtype
    layer = own if slots.bias else nn.Linear(dim, classes, dtype=kind).train(model.training)
    layer.load_state_dict({"weight": head.weight.to("cpu", kind), "bias": head.bias.to("cpu", kind)})
    model.set_submodule(name, layer)
    return model


def check_features(task: Task, method: str) -> None:
    """Refuse a model that does not show its features and what follows them.

    Raises:
        ConfigError: naming what is missing.
    """
    if not splits(task.model):
        raise ConfigError(
            f"model: {method} needs model.features(x) -> (B, d) and model.head; {type(task.model).__name__} lacks "
            "them: type model.head=NAME, the submodule that gives its output, give your module both, or type model=mlp"
        )


def check_named_head(task: Task) -> None:
    """Try a head named by ``model.head``, or a head in a forward pass of one's own, on the task's example.

    Raises:
        ConfigError: if it is not called once in a forward pass, or what goes into it is not (B, d).
    """
    name = named_head(task.model) or ("head" if task.forward is not None else None)
    if name is None or task.example is None:
        return
    if not isinstance(head_of(task.model), nn.Module):
        raise ConfigError(
            f"forward: this method needs what goes into the model's head, but {type(task.model).__name__}.head is no "
            "module: make it one, or type model.head=NAME"
        )
    z = _tried(task, features_of)
    if not isinstance(z, Tensor) or z.dim() != 2:
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ConfigError(
            f"model.head={name}: what goes into it is {shape} for two samples, expected (2, d); name a module that is "
            "given one vector of features a sample"
        )


def check_logits(task: Task, method: str) -> int | None:
    """How many logits C the model gives for each sample of the task's example; ``None`` where there is none.

    Raises:
        ConfigError: naming what it gives, if that is no logits (B, C).
    """
    if task.example is None:
        return None
    found = logits_of(_tried(task, task.output))
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(
            f"model: {method} computes with logits (B, C), but {type(task.model).__name__} gives {shape} for two "
            "samples; give a model that returns them, or type strategy=fedavg"
        )
    return found.shape[1]


def _tried(task: Task, use: Callable[[nn.Module, Any], Any]) -> Any:
    """What ``use`` makes of model and example, in evaluation mode; nobody's generators are touched."""
    modes = [(m, m.training) for m in task.model.modules()]
    task.model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return use(task.model, _like(task.model, task.example))
    finally:
        for m, training in modes:
            m.training = training


def _like(model: nn.Module, x: Any) -> Any:
    """A model's input in the type of its parameters."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tree_map(lambda t: t.to(kind) if isinstance(t, Tensor) and t.is_floating_point() else t, x)


def check_body(task: Task, method: str) -> None:
    """Refuse a model that has no features to learn: no parameters beside its head.

    Raises:
        ConfigError: naming the model.
    """
    name, head = type(task.model).__name__, head_of(task.model)
    own = set(map(id, head.parameters())) if isinstance(head, nn.Module) else set[int]()
    if all(id(p) in own for p in task.model.parameters() if p.requires_grad):
        raise ConfigError(
            f"{method} trains the features; {name} has no parameters beside its head: give model=mlp"
        )
