"""Room for large models on machines that hold several things of their size at once: what can do without memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.task.vectors import FlatModel

DONTNEED = 4  # of Linux's sys/mman.h
LARGE = 32 << 20  # bytes of a model that is worth it

_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def lend(flat: FlatModel, model: nn.Module) -> None:
    """Point the parameters of ``model``, which has the names and values of ``flat``, at its resident vector: they lie
    in memory once, and neither of the two may be trained any more."""
    named = dict(model.named_parameters())
    for slot, view in zip(flat.layout.params, flat.views, strict=True):
        named[slot.name].data = view


def on_disk(flat: FlatModel, folder: Path) -> None:
    """Move the resident vector into a file in ``folder`` that has no name and ends with this process: it takes memory
    from when it is looked at until :func:`rest`. It is not to be
    written to (what is, stays). It stays where it is if there is no room."""
    if not (size := flat.w.nbytes) or not hasattr(mmap.mmap, "madvise"):
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(flat.w.numpy().data)
            file.flush()
            access = mmap.PROT_READ | mmap.PROT_WRITE
            mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=access)
    except OSError:
        return
    _mappings.add(mapping)
    flat.w = torch.frombuffer(mapping, dtype=flat.w.dtype, count=flat.w.numel())
    flat.bind(flat.w)
    flat.views = flat.views_of(flat.w)


def rest() -> None:
    """Give the memory of what lies on disk back to the system, until it is looked at again."""
    for mapping in _mappings:
        mapping.madvise(mmap.MADV_DONTNEED)


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
