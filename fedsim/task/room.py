"""Room for large models on machines that hold several things of their size at once: what can do without memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor, nn

from fedsim.task.vectors import FlatModel

DONTNEED = 4  # of Linux's sys/mman.h


def lend(flat: FlatModel, model: nn.Module) -> None:
    """Point the parameters of ``model``, which has the names and values of ``flat``, at its resident vector: they lie
    in memory once, and neither of the two may be trained any more."""
    named = dict(model.named_parameters())
    for slot, view in zip(flat.layout.params, flat.views, strict=True):
        named[slot.name].data = view


def emptied(flat: FlatModel) -> None:
    """Give the memory of the resident vector back to the system: it holds zeros until the next ``load``."""
    flat.bind(flat.w)
    drop(flat.w)


def drop(t: Tensor) -> None:
    """The same of any contiguous tensor that owns its memory; on systems other than Linux it is only set to zero."""
    t.zero_()
    if (libc := _libc()) is None or not t.is_cpu:
        return
    start, page = t.data_ptr(), mmap.PAGESIZE
    first, end = -(-start // page) * page, (start + t.nbytes) // page * page
    if end > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
