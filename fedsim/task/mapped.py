"""Large tensors that stay as they are, in memory that all copies of a model share, in all processes of a machine.

Frozen parameters, and buffers that are not averaged, are the same in every copy. They are moved, once, into an
anonymous file (``memfd``), which each copy maps privately: reading costs no memory of its own, and who writes gets
pages of his own. So no other copy sees it and nothing crashes; a new mapping holds what was there at first. (Tensors
over Ray's object store would be no such thing: torch writes to its read-only arrays, and every process sees it.)
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.task.fixed import averaged

LARGE = (
    1 << 16
)  # entries beyond which a tensor is shared, and compared by torch's count of in-place changes only
SUPPORTED = hasattr(os, "memfd_create")
PAGE = mmap.PAGESIZE


class Memory:
    """An anonymous file that is filled once; ``fd`` is its descriptor in this process, ``name`` the file's alone."""

    def __init__(self, fd: int, name: str):
        self.fd, self.name = fd, name
        weakref.finalize(self, os.close, fd)

    @staticmethod
    def of_size(size: int) -> Memory:
        """A new one of ``size`` bytes."""
        name = f"fedsim-{secrets.token_hex(8)}"
        memory = Memory(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), name)
        os.ftruncate(memory.fd, size)
        return memory

    def write(self, start: int, content: memoryview) -> None:
        """Put bytes there."""
        while content:
            written = os.pwrite(self.fd, content, start)
            start, content = start + written, content[written:]

    def seal(self) -> None:
        """Nobody may write to the file from now on; private mappings are their owners' affair."""
        if hasattr(fcntl, "F_ADD_SEALS"):
            fcntl.fcntl(
                self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            )

    def map(self) -> mmap.mmap:
        """All of it, mapped anew."""
        return mmap.mmap(self.fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: from byte ``start`` of ``memory``."""

    memory: Memory
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, mapping: mmap.mmap) -> Tensor:
        """The tensor in a mapping of its memory."""
        count = _span(self.shape, self.stride)
        flat = torch.frombuffer(mapping, dtype=self.dtype, count=count, offset=self.start)
        view = flat.as_strided(self.shape, self.stride)
        _places[view.data_ptr()] = self
        weakref.finalize(mapping, _places.pop, view.data_ptr(), None).atexit = False
        return view


_places: dict[int, Place] = {}  # by address, as long as the mapping lives


def place_of(t: Tensor) -> Place | None:
    """Where ``t`` is a view of, if it is a whole one."""
    if t.device.type != "cpu" or t.layout != torch.strided:
        return None
    place = _places.get(t.data_ptr())
    if place is None or (place.dtype, place.shape, place.stride) != (t.dtype, tuple(t.shape), t.stride()):
        return None
    return place


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of ``tensors``, detached; of shared ones new private views, which hold what was there at first."""
    mappings: dict[Memory, mmap.mmap] = {}
    out = []
    for t in tensors:
        if (place := place_of(t)) is None:
            out.append(t.detach().clone())
            continue
        if place.memory not in mappings:
            mappings[place.memory] = place.memory.map()
        out.append(place.view(mappings[place.memory]))
    return out


def share(model: nn.Module) -> nn.Module:
    """Move what is large and stays as it is to shared memory, in place and with the same values; returns ``model``.

    What lies there already and was not written to stays; what is trained now, and was not before, moves out.
    """
    wanted = list(_wanted(model)) if SUPPORTED else []
    staying = set(map(id, wanted))
    for t in (*model.parameters(), *model.buffers()):
        if id(t) not in staying and place_of(t) is not None:
            t.data = t.detach().clone()
    if all(map(_unwritten, wanted)):
        return model
    starts, size = list[int](), 0
    for t in wanted:
        starts.append(size)
        size += -(-t.numel() * t.element_size() // PAGE) * PAGE
    memory = Memory.of_size(size)
    mapping = memory.map()
    for t, start in zip(wanted, starts, strict=True):
        raw = t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)
        memory.write(start, raw.numpy().data)
        # one by one, so that the memory from before is free again before the next is copied
        t.data = Place(memory, start, t.dtype, tuple(t.shape), t.stride()).view(mapping)
    memory.seal()
    return model


def trim(model: nn.Module) -> None:
    """Give what was freed while a model with large frozen parts computed back to the system, where the C library keeps
    it: this process may wait from now on, while workers compute."""
    if any(place_of(p) is not None for p in model.parameters()):
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _wanted(model: nn.Module) -> Iterator[Tensor]:
    moving = {id(b) for _, b in averaged(model)}
    for t in (*model.parameters(), *model.buffers()):
        if t.requires_grad or id(t) in moving or type(t) not in (nn.Parameter, Tensor):
            continue
        plain = (
            t.device.type == "cpu" and t.layout == torch.strided and not (t.is_quantized or t.is_inference())
        )
        if plain and t.numel() > LARGE and _span(t.shape, t.stride()) == t.numel():
            yield t


def _unwritten(t: Tensor) -> bool:
    return place_of(t) is not None and torch.equal(t, clones([t])[0])


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Entries from the first to the last of a tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
