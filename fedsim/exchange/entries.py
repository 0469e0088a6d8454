"""Entries of a vector that leaves a client: those that are no padding, those that are shared, their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import EngineError
from fedsim.exchange.payload import Payload

if TYPE_CHECKING:
    from fedsim.task.layout import Layout
    from fedsim.task.slots import Slots


def clip(v: Tensor, bound: float, length: float | None = None, inplace: bool = False) -> tuple[Tensor, float]:
    """``v min(1, C/|v|)`` and the factor; zero stays zero, and what fits is returned as it is. ``length``: |v|, where
    it is known; ``inplace``: nobody else reads ``v``.

    McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018.
    """
    length = length_of(v) if length is None else length
    if length <= bound:
        return v, 1.0
    factor = bound / length
    return (v.mul_(factor) if inplace else v * factor), factor


def length_of(v: Tensor) -> float:
    """The L2 norm, summed in float64; of float32 off by less than 1e-6 of it: in main memory BLAS sums it, which reads
    the vector once and makes no other of its size, elsewhere it is summed pairwise."""
    if not v.numel():
        return 0.0
    if v.dtype == torch.float32:
        row = v.detach().reshape(-1) if v.requires_grad or v.dim() != 1 else v
        length = float(_nrm2()(row.numpy()) if v.is_cpu else row.square().sum().sqrt())
        if 1e-15 < length < math.inf:
            return length
    return math.sqrt(float(v.detach().flatten().double().square().sum()))


def lengths_of(arrays: Mapping[str, Tensor], bounds: Mapping[str, float | None]) -> dict[str, float]:
    """Lengths of the vectors that are clipped: one that is finite tells that all entries are."""
    found = dict[str, float]()
    for name, bound in bounds.items():
        if bound is not None and name in arrays and (v := arrays[name]).is_floating_point():
            found[name] = length_of(v)
    return found


@cache
def _nrm2() -> Callable[[np.ndarray], float]:
    from scipy.linalg import blas  # a fifth of a second that runs without a bound can do without

    return cast("Callable[[np.ndarray], float]", blas.snrm2)


def slots_of(v: Tensor, layout: Layout) -> Slots | None:
    """How ``v`` lies in the layout, if it is one of its flat vectors."""
    if v.dim() != 1:
        return None
    return next((s for s in layout.vectors.values() if s.dim == len(v) and s.holds(v)), None)


def flat(v: Tensor, slots: Slots | None) -> Tensor:
    """``v`` without padding, as a row."""
    return v.reshape(-1) if slots is None else slots.compact(v)


def shaped(x: Tensor, slots: Slots | None, like: Tensor) -> Tensor:
    """The inverse of :func:`flat`."""
    return x.reshape(like.shape) if slots is None else slots.expand(x)


def like_of(name: str, message: Payload, dtype: torch.dtype) -> Tensor:
    """Of the shape of a vector that nobody sent: what the message holds under its name, else the model."""
    found = message.arrays.get(name, message.arrays.get("w"))
    if found is None:
        raise EngineError(
            f"nobody sent '{name}', and the message holds neither that nor w: its noise has no shape"
        )
    return found.to("cpu", dtype)


def spread(part: Tensor, places: Tensor | None, d: int) -> Tensor:
    """``part`` (k,) at its ``places`` of (d,), zero elsewhere; with no places it is all."""
    return part if places is None else part.new_zeros(d).index_copy_(0, places, part)


def shared_entries(layout: Layout, stays: tuple[slice, ...], v: Tensor, slots: Slots | None) -> Tensor | None:
    """1 for entries of a flat vector, without padding, that leave clients, else 0 (size,); None: all of them do."""
    if not stays or slots is not layout.params:
        return None
    mask = torch.ones(slots.dim, dtype=torch.float64)
    for span in stays:
        mask[span] = 0
    return slots.compact(mask)
