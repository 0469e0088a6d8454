"""Classifiers that compare directions: for classes that are found by where features point, however long they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ConfigError


class CosineHead(nn.Module):
    """Logits ``scale cos(z, w_c)`` (B, C) of features z (B, d) and rows w_c of ``weight`` (C, d)."""

    def __init__(self, weight: Tensor, scale: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = scale

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.scale * (F.normalize(z, dim=1) @ F.normalize(self.weight, dim=1).T)


def cosine(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    model: Callable[[Sequence[int], int], nn.Module],
    scale: float = 10.0,
) -> nn.Module:
    """``model`` with a cosine classifier in the place of its linear ``head``, whose weights it takes over."""
    if not scale > 0:
        raise ConfigError(f"model.scale={scale}: must be positive")
    built = model(input_shape, num_classes)
    head = getattr(built, "head", None)
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model.model: {type(built).__name__} has no linear head; choose another, e.g. mlp")
    built.head = CosineHead(head.weight, scale)
    return built
