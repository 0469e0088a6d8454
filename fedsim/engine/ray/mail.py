"""Mail between the processes of one machine: a small pickle, its arrays in an anonymous file that both sides map.

An object store copies each vector and wakes other processes for it, which at the size of common models costs more than
the vector's own arithmetic. Here one side writes, the other maps; the pages stay mapped from round to round. The files
have no name (``memfd``): they vanish with their processes, however these end.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import itertools
import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL = 4096  # bytes: smaller arrays travel in the pickle itself
ALIGN = 64
POSSIBLE = hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


class Place(NamedTuple):
    """Where another process of this machine finds a slot."""

    pid: int
    fd: int
    inode: int


class Mail(NamedTuple):
    """A pickle without its large arrays, and (offset, bytes) of each of these in the slot.

    Never much more than ``SMALL`` bytes: a long pickle lies in the slot too, behind an empty ``head``.
    """

    head: bytes
    spans: tuple[tuple[int, int], ...] = ()


class Slot:
    """A growing anonymous file that holds the arrays of one mail."""

    def __init__(self, place: Place | None = None):
        if place is None:
            self.fd = os.memfd_create("fedsim")
        else:
            self.fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR)
        self.place = Place(
            os.getpid(), self.fd, os.fstat(self.fd).st_ino
        )  # a number is used again, an inode is not
        weakref.finalize(self, os.close, self.fd)
        self._map: mmap.mmap | None = None

    def write(self, value: Any) -> Mail:
        """Pickle ``value``; what the slot held before is overwritten."""
        arrays: list[memoryview] = []

        def out_of_band(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes >= SMALL:
                arrays.append(raw)
            return raw.nbytes < SMALL

        head = io.BytesIO()
        pickler = pickle.Pickler(head, protocol=5, buffer_callback=out_of_band)
        pickler.dispatch_table = _REDUCERS
        pickler.dump(value)
        mail = Mail(head.getvalue(), _laid_out(arrays))
        if len(mail.head) + 32 * len(mail.spans) > SMALL:
            arrays.append(memoryview(pickle.dumps(mail)))
            mail = Mail(b"", _laid_out(arrays)[-1:])
        if arrays:
            spans = _laid_out(arrays)
            mapped = self._mapped(sum(spans[-1]))
            for (start, size), raw in zip(spans, arrays, strict=True):
                mapped[start : start + size] = raw
        return mail

    def read(self, mail: Mail, done: Callable[[], object] | None = None) -> Any:
        """The value; its arrays are views of the slot. ``done`` is called when the last of them is gone."""
        if not mail.head:
            ((start, size),) = mail.spans
            mail = pickle.loads(self._mapped(start + size)[start : start + size])
        if not mail.spans:
            if done is not None:
                done()
            return pickle.loads(mail.head)
        end = sum(mail.spans[-1])
        block = (ctypes.c_char * end).from_buffer(self._mapped(end))
        if done is not None:
            weakref.finalize(block, done).atexit = False
        view = memoryview(block).cast("B")
        return pickle.loads(mail.head, buffers=[view[start : start + size] for start, size in mail.spans])

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


class Slots:
    """One side: slots to write to. Each is taken by one mail and given back when nothing reads it any more."""

    def __init__(self) -> None:
        self._free: list[Slot] = []

    def take(self) -> Slot:
        """A slot that nobody else uses."""
        return self._free.pop() if self._free else Slot()

    def give(self, slot: Slot) -> None:
        """Make ``slot`` free again."""
        self._free.append(slot)

    def probe(self) -> Probe | None:
        """What tells a process whether it shares this one's memory; ``None`` where nobody can."""
        if not POSSIBLE:
            return None
        slot, token = Slot(), os.urandom(2 * SMALL)
        mail = slot.write(torch.frombuffer(bytearray(token), dtype=torch.uint8))
        return Probe(slot, slot.place, mail, token)


@dataclass
class Probe:
    """Random bytes, told openly and by mail. Travels without its slot, which must live as long as the probe is sent."""

    slot: Slot | None
    place: Place
    mail: Mail
    token: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return Probe, (None, self.place, self.mail, self.token)


class Box:
    """The other side: slots of one process, opened on first use."""

    def __init__(self) -> None:
        self._open: dict[Place, Slot] = {}

    def __getitem__(self, place: Place) -> Slot:
        if place not in self._open:
            self._open[place] = Slot(place)
        return self._open[place]

    def reaches(self, probe: Probe | None) -> bool:
        """Whether mail arrives here: the same machine, the same user."""
        try:
            return probe is not None and bytes(self[probe.place].read(probe.mail).numpy()) == probe.token
        except (OSError, ValueError):
            return False


def _reduce(t: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (t.detach().cpu().contiguous().numpy(),)


_REDUCERS: dict[type, Any] = {**copyreg.dispatch_table, Tensor: _reduce}
