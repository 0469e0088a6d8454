"""What a data source returns: samples in their storage type, and how a batch becomes model input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.data.trees import Tree, leaves, tree_map

Pair = tuple[Any, Any]  # x, y as a caller hands them over: tensors or arrays

# A batch transform for training: (raw batch (B, ...), generator) -> (B, ...) of the same type.
# See fedsim.data.augment.
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Normalize:
    """``(x * scale - mean) / std`` per channel, computed in the run's dtype when a batch is gathered.

    ``mean`` and ``std`` have one entry per channel (dimension 1 of the batch) or a single entry.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert a raw batch ``(B, C, ...)`` to ``dtype`` and normalise it; always a fresh tensor."""
        out = x.to(dtype, copy=True)
        shape = (1, -1) + (1,) * (x.dim() - 2) if len(self.mean) > 1 else (1,) * x.dim()
        mean, std = (_constants(v, dtype, x.device).view(shape) for v in (self.mean, self.std))
        return out.mul_(self.scale).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` on ``device``, put there once: each way to a GPU waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def onto(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``; a small tensor of the host's goes to a GPU without waiting for what that computes."""
    if device.type == "cuda" and t.is_cpu:
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


class SamplesLike(Protocol):
    """Samples wherever they lie: in memory (``Samples``), or read when they are needed (``fedsim.data.lazy``)."""

    # whether a batch is a piece of any larger one; else each is put together by itself
    sliceable: ClassVar[bool]

    def __len__(self) -> int:
        """How many there are."""

    def take(self, rows: Tensor) -> tuple[Tree, Tree]:
        """Samples ``rows`` (B,) int64: their inputs and targets, fresh; targets are ``None`` where there are none."""

    @property
    def labels(self) -> Tensor | None:
        """The targets (N, ...) as one tensor in memory; ``None`` where they are no such thing."""

    def to(self, device: str) -> SamplesLike:
        """The same, as tensors on ``device``."""


@dataclass(frozen=True)
class Samples:
    """Inputs ``x`` and targets ``y``, each a tensor (N, ...) in storage type (uint8 images, floats, int64 tokens) or a
    tree of such; ``y`` is ``None`` where there are none. Arrays in files stand for tensors (``fedsim.data.lazy``)."""

    x: Tree
    y: Tree = None
    sliceable: ClassVar[bool] = True

    def __len__(self) -> int:
        x = self.x
        return x.shape[0] if isinstance(x, Tensor) else next((len(leaf) for leaf in leaves(x)), 0)

    def take(self, rows: Tensor) -> tuple[Tree, Tree]:
        """See ``SamplesLike``."""
        x, y = self.x, self.y
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if not x.is_cpu:
                rows = onto(rows, x.device)
            return x.index_select(0, rows), y.index_select(0, rows)
        return tree_map(lambda t: taken(t, rows), x), tree_map(lambda t: taken(t, rows), y)

    @property
    def labels(self) -> Tensor | None:
        """See ``SamplesLike``."""
        return self.y if isinstance(self.y, Tensor) else None

    @cached_property
    def width(self) -> int:
        """Numbers in the inputs of one sample."""
        return sum(math.prod(leaf.shape[1:]) for leaf in leaves(self.x))

    def to(self, device: str) -> Samples:
        """See ``SamplesLike``."""
        return Samples(tree_map(lambda t: t.to(device), self.x), tree_map(lambda t: t.to(device), self.y))


def taken(part: Any, rows: Tensor) -> Tensor:
    """Entries ``rows`` of a tensor, or of what stands for one."""
    if isinstance(part, Tensor):
        return part.index_select(0, onto(rows, part.device))
    found: Tensor = part.take(rows)
    return found


@dataclass(frozen=True)
class Dataset:
    """A whole data set before it is split over clients.

    ``ids`` (N,) int64 are natural client ids of the training samples (writer, role, hospital) or ``None``;
    ``groups`` are further int64 columns by name and split, e.g.
    ``{"train": {"domain": (N,)}, "test": {...}}``,
    and ``group_names`` says what their values are called, e.g. ``{"domain": ("photo", "sketch")}``.
    """

    train: SamplesLike
    test: SamplesLike | None = None
    classes: tuple[str, ...] = ()
    normalize: Normalize | None = None
    augment: Augment | None = None
    ids: np.ndarray | None = None
    groups: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    group_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spell: Callable[[list[int]], str] | None = None  # tokens to text, where samples are such
    columns: tuple[str, ...] = ()  # names of the columns of x (N, d), where it is a table

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where the target is not a class label."""
        return len(self.classes)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains of a multi-domain data set; empty for others."""
        return tuple(self.group_names.get("domain", ()))

    def domain(self, split: str) -> np.ndarray | None:
        """Domain ``(N,)`` of the samples of ``split`` (train, test); ``None`` where there are none."""
        return self.groups.get(split, {}).get("domain") if self.domains else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the model sees it (normalising does not change it); empty where there are several."""
        x: Any = getattr(self.train, "x", None)
        return tuple(x.shape[1:]) if hasattr(x, "shape") else ()

    def class_labels(self, split: str = "train") -> Tensor | None:
        """Class ids ``(N,)`` int64 of the samples of ``split``; ``None`` where targets are no class labels."""
        part = self.train if split == "train" else self.test
        labels = None if part is None else part.labels
        return labels if self.num_classes and labels is not None and labels.dim() == 1 else None
