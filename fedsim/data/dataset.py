"""What a data source returns: samples in their storage type, and how a batch becomes model input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        mean = torch.tensor(self.mean, dtype=dtype, device=x.device).view(shape)
        std = torch.tensor(self.std, dtype=dtype, device=x.device).view(shape)
        return out.mul_(self.scale).sub_(mean).div_(std)


@dataclass(frozen=True)
class Samples:
    """``x`` (N, ...) in storage type (uint8 images, floats, int64 tokens) and ``y`` (N,) or (N, ...)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Dataset:
    """A whole data set before it is split over clients.

    ``ids`` (N,) int64 are natural client ids of the training samples (writer, role, hospital) or ``None``;
    ``groups`` are further int64 columns by name and split, e.g.
    ``{"train": {"domain": (N,)}, "test": {...}}``,
    and ``group_names`` says what their values are called, e.g. ``{"domain": ("photo", "sketch")}``.
    """

    train: Samples
    test: Samples | None = None
    classes: tuple[str, ...] = ()
    normalize: Normalize | None = None
    augment: Augment | None = None
    ids: np.ndarray | None = None
    groups: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    group_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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
        """Shape of one sample as the model sees it (normalising does not change it)."""
        return tuple(self.train.x.shape[1:])
