"""Checkpoints of before: how the vectors in them become those of today."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsim.task.layout import Layout


def with_padding(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors of a checkpoint of format 1, whose vectors had no padding, as they are now.

    A vector (or a stack of them) is told by its length: as many numbers as the model has parameters, or statistics
    where the name ends in ``buffers``. Everything else stays as it is.
    """
    return {name: _with_padding(name, t, layout) for name, t in tensors.items()}


def _with_padding(name: str, t: Tensor, layout: Layout) -> Tensor:
    if t.dim() and t.is_floating_point():
        if name.endswith("buffers") and t.shape[-1] == layout.buffer_size:
            return layout.buffers.expand(t)
        if t.shape[-1] == layout.size:
            return layout.params.expand(t)
    return t
