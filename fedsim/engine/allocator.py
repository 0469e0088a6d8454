"""Memory that the process frees stays its own while it computes: what the command's environment does, for notebooks.

Activations of convolutional nets are large enough that glibc gives them back to the system with every batch, and the
next batch faults them in again, page by page. glibc reads ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_``
when a process starts; a process that runs already asks by ``mallopt`` (3).

glibc raises both thresholds by itself as blocks are freed, to 32 and 64 MiB at most, and stops that for good once it is
asked. So that is where they are left: at 128 KiB, where they begin, the caller's own loops would be slower than before.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

TRIM, MMAP = -1, -3  # of malloc.h: how much is free at the end before it goes back; what is mapped by itself
KEPT = 2**31 - 1  # bytes: as much as mallopt takes
REACHED = {TRIM: 64 << 20, MMAP: 32 << 20}  # bytes: as far as glibc goes by itself
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")

_lock, _users = Lock(), 0


@contextmanager
def keeping() -> Iterator[None]:
    """Within the block freed memory is kept for the next batch; after the last of several blocks it goes back.

    Nothing happens where the environment says how it is to be, or where malloc is not glibc's.
    """
    libc = None if any(name in os.environ for name in VARIABLES) else _glibc()
    if libc is None:
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def give_back() -> None:
    """What is free goes back to the system now, where malloc is glibc's."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _count(libc: Any, change: int) -> None:
    global _users
    with _lock:
        before, _users = _users, _users + change
        if not before or not _users:
            for number, reached in REACHED.items():
                if not _users or not libc.mallopt(
                    number, KEPT
                ):  # before 2.35 it takes no more for what is mapped
                    libc.mallopt(number, reached)
        if not _users:
            libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return (
        libc
        if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version"))
        else None
    )
