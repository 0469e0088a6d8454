"""Samples that were handed over go to shared memory without a second copy, and stay where they are.

glibc gives a large block a mapping of its own. Its bytes are written to an anonymous file, piece by piece, and the file
takes the place of the block's pages, mapped privately: the caller's tensors keep their addresses and values, workers
map the same file, and whoever writes gets pages of his own. A block that is freed is unmapped as ever.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.task.mapped import SUPPORTED, Memory, Place

LEAST = 4 << 20  # bytes of a block that is worth a mapping
MOST = 64  # blocks: each takes a descriptor here and in every worker
PIECE = 16 << 20  # bytes that lie in memory twice for a moment
IS_MAPPING, FLAGS = 2, 7  # of the size that glibc writes before a block
FAILED = ctypes.c_void_p(-1).value


class InPlace:
    """Blocks of this process by their start, as far as they were moved."""

    def __init__(self) -> None:
        self._blocks: dict[int, Memory] = {}

    @property
    def memories(self) -> list[Memory]:
        """What workers map: to be kept as long as one may be started."""
        return list(self._blocks.values())

    def place(self, t: Tensor) -> Place | None:
        """Where ``t`` lies in shared memory from now on; ``None`` if it must be copied."""
        found = _block(t)
        if found is None:
            return None
        start, size = found
        if start not in self._blocks:
            if len(self._blocks) >= MOST:
                return None
            try:
                self._blocks[start] = _moved(start, size)
            except OSError:  # no descriptor, or no room, is left: what was moved by then holds the same bytes
                return None
        return Place(self._blocks[start], t.data_ptr() - start, t.dtype, tuple(t.shape), t.stride())


def _block(t: Tensor) -> tuple[int, int] | None:
    """Address and bytes of the mapping that is nothing but the memory of ``t``, if glibc made it one."""
    libc = _glibc()
    if libc is None or not SUPPORTED or not t.is_cpu or type(t) is not Tensor or not t.is_contiguous():
        return None
    storage = t.untyped_storage()
    at = storage.data_ptr()
    # torch's own allocator aligns to 64; NumPy's arrays are left alone, since they may be resized where they lie
    if storage.nbytes() < LEAST or at % 64 or at % mmap.PAGESIZE < 16:
        return None
    before, size = (ctypes.c_size_t * 2).from_address(at - 16)
    start, end = at - 16 - before, at - 16 + (size & ~FLAGS)
    whole = size & IS_MAPPING and not start % mmap.PAGESIZE and not end % mmap.PAGESIZE
    fits = before < mmap.PAGESIZE and 0 <= end - at - storage.nbytes() < 2 * mmap.PAGESIZE
    return (start, end - start) if whole and fits and _private(start, end) else None


def _private(start: int, end: int) -> bool:
    """Whether the addresses lie within one private mapping, readable and writable."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        a, b = (int(v, 16) for v in span.split("-"))
        if a <= start < b:
            return end <= b and rights == "rw-p" and not line.endswith("[heap]")
    return False


def _moved(start: int, size: int) -> Memory:
    """A file that lies where the block lay."""
    memory, libc = Memory.of_size(size), _glibc()
    rights, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
    for at in range(0, size, PIECE):
        piece = min(PIECE, size - at)
        memory.write(at, memoryview((ctypes.c_char * piece).from_address(start + at)).cast("B"))
        if libc.mmap(start + at, piece, rights, kind, memory.fd, at) == FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory.seal()
    return memory


@cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc" or ctypes.sizeof(ctypes.c_size_t) != 8:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc
