"""Values passed between the processes of one machine: a small pickle, its arrays in an anonymous file that both map.

An object store copies each vector and wakes other processes for it, which at the size of common models costs more than
the vector's own arithmetic. Here one side writes, the other maps; the pages stay mapped from round to round. The files
lie in memory only (``memfd``): they vanish with their processes, however these end.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import itertools
import mmap
import os
import pickle
import secrets
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IN_BAND = 4096  # bytes: smaller arrays travel in the pickle itself
ALIGN = 64
SUPPORTED = hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


class Address(NamedTuple):
    """Where another process of this machine finds a block: a descriptor of the process that made it.

    Descriptors are used again, and have the same numbers on other machines; the random ``name`` is the file's alone.
    """

    pid: int
    fd: int
    name: str

    def open(self) -> int:
        """A descriptor of our own. Raises ``OSError`` on another machine, as another user, or once it is gone."""
        path = Path(f"/proc/{self.pid}/fd/{self.fd}")
        if not str(path.readlink()).startswith(f"/memfd:{self.name} "):
            raise FileNotFoundError(f"{path} is not the memory {self.name}")
        return os.open(path, os.O_RDWR)


class Packed(NamedTuple):
    """A value in a block: its pickle without the large arrays, and (offset, bytes) of each of these in the block.

    Never much more than ``IN_BAND`` bytes: a long pickle lies in the block too, behind an empty ``head``.
    """

    address: Address
    head: bytes
    spans: tuple[tuple[int, int], ...] = ()


class Block:
    """A growing anonymous file that holds one value at a time."""

    def __init__(self, address: Address | None = None):
        if address is None:
            name = f"fedsim-{secrets.token_hex(8)}"
            self.fd = os.memfd_create(name)
            address = Address(os.getpid(), self.fd, name)
        else:
            self.fd = address.open()
        self.address = address
        weakref.finalize(self, os.close, self.fd)
        self._map: mmap.mmap | None = None

    def write(self, value: Any) -> Packed:
        """Pickle ``value``; what the block held before is overwritten."""
        arrays: list[memoryview] = []

        def out_of_band(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes >= IN_BAND:
                arrays.append(raw)
            return raw.nbytes < IN_BAND

        head = io.BytesIO()
        pickler = pickle.Pickler(head, protocol=5, buffer_callback=out_of_band)
        pickler.dispatch_table = _REDUCERS
        pickler.dump(value)
        packed = Packed(self.address, head.getvalue(), _laid_out(arrays))
        if len(packed.head) + 32 * len(packed.spans) > IN_BAND:
            arrays.append(memoryview(pickle.dumps(packed)))
            packed = Packed(self.address, b"", _laid_out(arrays)[-1:])
        if arrays:
            spans = _laid_out(arrays)
            mapped = self._mapped(sum(spans[-1]))
            for (start, size), raw in zip(spans, arrays, strict=True):
                mapped[start : start + size] = raw
        return packed

    def read(self, packed: Packed, done: Callable[[], object] | None = None) -> Any:
        """The value; its arrays are views of the block. ``done`` is called when the last of them is gone."""
        if not packed.head:
            ((start, size),) = packed.spans
            packed = pickle.loads(self._mapped(start + size)[start : start + size])
        if not packed.spans:
            if done is not None:
                done()
            return pickle.loads(packed.head)
        end = sum(packed.spans[-1])
        buffer = (ctypes.c_char * end).from_buffer(self._mapped(end))
        if done is not None:
            weakref.finalize(buffer, done).atexit = False
        view = memoryview(buffer).cast("B")
        return pickle.loads(packed.head, buffers=[view[start : start + size] for start, size in packed.spans])

    def _mapped(self, size: int) -> mmap.mmap:
        """The file mapped to at least ``size`` bytes; an older, smaller mapping lives on under its views."""
        if self._map is None or len(self._map) < size:
            if os.fstat(self.fd).st_size < size:
                os.ftruncate(self.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._map = mmap.mmap(self.fd, 0)
        return self._map


def _laid_out(arrays: Sequence[memoryview]) -> tuple[tuple[int, int], ...]:
    """(offset, bytes) of each array, one after the other."""
    padded = [-(-raw.nbytes // ALIGN) * ALIGN for raw in arrays]
    return tuple(zip(itertools.accumulate(padded, initial=0), (raw.nbytes for raw in arrays), strict=False))


class FreeBlocks:
    """The driver's blocks. Each is taken for one value and given back when nothing reads that any more."""

    def __init__(self) -> None:
        self._free: list[Block] = []

    def take(self) -> Block:
        """A block that nobody else uses."""
        return self._free.pop() if self._free else Block()

    def give(self, block: Block) -> None:
        """Make ``block`` free again."""
        self._free.append(block)


class OpenBlocks:
    """A worker's view of the driver's blocks, each opened on first use."""

    def __init__(self) -> None:
        self._open: dict[Address, Block] = {}

    def __getitem__(self, address: Address) -> Block:
        if address not in self._open:
            self._open[address] = Block(address)
        return self._open[address]

    def read(self, packed: Packed) -> Any:
        """The value, wherever it lies."""
        return self[packed.address].read(packed)


def _reduce(t: Tensor) -> tuple[Any, ...]:
    t = t.detach().cpu().contiguous()
    try:
        return torch.from_numpy, (t.numpy(),)
    except TypeError:  # a type that numpy lacks
        return _restored, (t.view(torch.uint8 if t.itemsize == 1 else torch.int16).numpy(), t.dtype)


def _restored(a: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(a).view(dtype)


_REDUCERS: dict[type, Any] = {**copyreg.dispatch_table, Tensor: _reduce}
