"""Samples that are read when they are needed: arrays in files, parts of several owners, torch data sets."""

from __future__ import annotations

import hashlib
import math
import mmap
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fedsim.data.dataset import taken
from fedsim.data.trees import Tree, tree_map
from fedsim.errors import DataError
from fedsim.rng import seed_global, undisturbed

HELD = 256 << 20  # bytes of a file that may stay mapped in memory at a time
PROBES, PROBE = 256, 1 << 20  # places in a large file, and bytes read at each, that tell it apart


class Mapped:
    """An array (n, ...) in a file, which stands for a tensor in ``Samples``; its rows are read when they are taken.

    Workers map the same file: it must lie where all of them can read it.
    """

    def __init__(self, array: np.memmap, device: str = "cpu"):
        """``array``: of ``numpy.load(path, mmap_mode="r")`` or ``numpy.memmap``, or rows of one."""
        if array.filename is None or not array.flags.c_contiguous:
            raise DataError(
                "a memory-mapped array must be the whole of its file, or rows one after the other (x[100:200]), in C "
                "order; hand over that"
            )
        self._place = (str(array.filename), array.dtype.str, array.shape, _offset(array))
        self._open()
        self._device = device

    def _open(self) -> None:
        path, dtype, shape, offset = self._place
        try:
            self._array = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: the mapped array cannot be read ({error}); workers need the file too"
            ) from error
        self._touched = 0

    def __getstate__(self) -> tuple[Any, str]:
        return self._place, self._device

    def __setstate__(self, state: tuple[Any, str]) -> None:
        self._place, self._device = state
        self._open()

    def __len__(self) -> int:
        return int(self._place[2][0])

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ...)."""
        return tuple(self._place[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that are taken."""
        return torch.from_numpy(np.empty(0, self._array.dtype)).dtype

    def take(self, rows: Tensor) -> Tensor:
        """Rows (B,) as a tensor of its own; what was read is dropped from memory after a while."""
        found = torch.from_numpy(self._array[rows.cpu().numpy()])
        self._touched += max(found.nbytes, len(rows) * mmap.PAGESIZE)
        if self._touched > HELD:
            base: Any = self._array._mmap  # type: ignore[attr-defined]
            base.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return found.to(self._device)

    def to(self, device: str) -> Mapped:
        """The same, with rows that come on ``device``."""
        return Mapped(self._array, device)

    def digest(self) -> str:
        """Tells the content apart: all of a small file, else its size, its date and what lies at many places."""
        path = Path(self._place[0])
        size, found = path.stat().st_size, hashlib.sha256(repr(self._place[1:]).encode())
        with path.open("rb") as file:
            if size <= PROBES * PROBE:
                found.update(file.read())
            else:
                found.update(f"{size} {path.stat().st_mtime_ns}".encode())
                for at in np.linspace(0, size - PROBE, PROBES).astype(np.int64).tolist():
                    file.seek(at)
                    found.update(file.read(PROBE))
        return found.hexdigest()


def _offset(array: np.memmap) -> int:
    """Where in its file an array begins; NumPy says of a slice only where the array begins that it was cut from."""
    held: Any = array._mmap  # type: ignore[attr-defined]
    into = array.ctypes.data - np.frombuffer(held, dtype=np.uint8).ctypes.data
    return int(array.offset - array.offset % mmap.ALLOCATIONGRANULARITY + into)


class Parts:
    """Tensors of several owners one after the other, which stand for one tensor in ``Samples``, without a copy."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = tuple(parts)
        self.ends = np.cumsum([0, *map(len, parts)])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ...)."""
        return (len(self), *self.parts[0].shape[1:])

    def take(self, rows: Tensor) -> Tensor:
        """Rows (B,), whoever has them."""
        found: Tensor = by_part(self.ends, rows, lambda i, own: taken(self.parts[i], own), torch.cat)
        return found

    def to(self, device: str) -> Parts | Tensor:
        """The same on ``device``: tensors as the one that they stand for, since that takes no more room there."""
        if not all(isinstance(p, Tensor) and p.dtype == self.dtype for p in self.parts):
            return Parts([p.to(device) for p in self.parts])
        whole = torch.empty(self.shape, dtype=self.dtype, device=device)
        for part, start, stop in zip(self.parts, self.ends, self.ends[1:], strict=False):
            whole[start:stop] = part
        return whole


def by_part(
    ends: np.ndarray, rows: Tensor, take: Callable[[int, Tensor], Any], put: Callable[[Any], Any]
) -> Any:
    """Entries ``rows`` (B,) of parts that end at ``ends``; of several parts put together in the order asked."""
    whose = np.searchsorted(ends, rows.numpy(), side="right") - 1
    if not len(rows) or (whose == whose[0]).all():
        first = int(whose[0]) if len(rows) else 0
        return take(first, rows - int(ends[first]))
    owners = np.unique(whose)
    where = [torch.from_numpy(np.flatnonzero(whose == i)) for i in owners]
    found = put([take(int(i), rows[at] - int(ends[i])) for i, at in zip(owners, where, strict=True)])
    back = torch.argsort(torch.cat(where))
    return tree_map(lambda t: t.index_select(0, back.to(t.device)), found)


@dataclass(frozen=True, eq=False)
class Read:
    """A map-style data set whose samples are read, transforms and all, and put together by ``collate`` batch by batch.

    A pair is inputs and targets; any other batch is inputs alone. ``labels`` (N,), if known, are the class ids, which
    take the place of the targets; those that a ``collate`` of the user's gives keep its order (it may sort by length),
    and become ids by ``table`` where their values are others. What is no single value a sample stays as it gives it.
    """

    data: Any
    collate: Callable[[list[Any]], Any] = default_collate
    labels: Tensor | None = None
    table: Mapping[Any, int] | None = None
    device: str = "cpu"
    sliceable: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: Tensor) -> tuple[Tree, Tree]:
        """See ``SamplesLike``."""
        x, y = halves(self.collate(self.items(rows.tolist())))
        if self.labels is not None:
            y = self.labels[rows] if self.collate is default_collate else self._ids(y, self.labels[rows])
        return (x, y) if self.device == "cpu" else (_moved(x, self.device), _moved(y, self.device))

    def _ids(self, y: Tree, known: Tensor) -> Tree:
        """Class ids (B,) of targets that ``collate`` put together of samples whose ids are ``known`` (B,)."""
        values = singles(y)
        if values is None or len(values) != len(known):
            return y if isinstance(y, Tensor) else known
        table = self.table
        return torch.tensor([int(v) if table is None else table[v] for v in values], dtype=torch.int64)

    def items(self, rows: list[int]) -> list[Any]:
        """Samples as the data set gives them."""
        order = type(self.data).__mro__
        one, many = (next((c for c in order if m in vars(c)), None) for m in ("__getitem__", "__getitems__"))
        if many is None or (one is not None and order.index(one) < order.index(many)):
            return [
                self.data[i] for i in rows
            ]  # a __getitem__ of its own goes before an inherited __getitems__
        return list(self.data.__getitems__(rows))

    def to(self, device: str) -> Read:
        """See ``SamplesLike``."""
        return replace(self, device=device)


class Joined:
    """Data sets of several owners one after the other, as one; the part of ``Read`` that fetches samples."""

    def __init__(self, parts: Sequence[Any]):
        self.parts, self.ends = tuple(parts), np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, rows: list[int]) -> list[Any]:
        whose = np.searchsorted(self.ends, rows, side="right") - 1
        return [self.parts[i][row - int(self.ends[i])] for i, row in zip(whose.tolist(), rows, strict=True)]


def halves(batch: Any) -> tuple[Tree, Tree]:
    """Inputs and targets of a collated batch: a pair is both; anything else is inputs alone."""
    if batch is None:
        raise DataError(
            "a data set's samples, or what its collate_fn made of them, are None; is there a return?"
        )
    if isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    elif isinstance(batch, Mapping) and set(batch) == {"x", "y"}:
        x, y = batch["x"], batch["y"]
    else:
        x, y = batch, None
    return tuple(dict(t) if isinstance(t, Mapping) else t for t in (x, y))  # type: ignore[return-value]


def singles(y: Tree) -> list[Any] | None:
    """Targets (B,) or (B, 1), array or list, as a list of B numbers or words; ``None`` if they are no such thing."""
    if isinstance(y, Tensor | np.ndarray):
        return y.reshape(-1).tolist() if y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1) else None
    if not isinstance(y, tuple | list):
        return None
    found = [
        v.item() if isinstance(v, Tensor | np.ndarray | np.generic) and math.prod(v.shape) == 1 else v
        for v in y
    ]
    return found if all(isinstance(v, int | float | str) for v in found) else None


def digest(samples: Any) -> str:
    """Tells the content of samples, or of what stands for a tensor, apart; reads all of what is read row by row."""
    if isinstance(samples, Mapped):
        return samples.digest()
    found = hashlib.sha256()
    with undisturbed():
        seed_global(0)  # for transforms that draw
        for row in range(len(samples)):
            for part in samples.items([row]):
                found.update(pickle.dumps(tree_map(_plain, part)))
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """Tensors and images as their bytes, which pickle alike at all times."""
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    return (value.size, value.mode, value.tobytes()) if hasattr(value, "getbands") else value


def _moved(tree: Tree, device: str) -> Tree:
    move = getattr(tree, "to", None)
    return (
        move(device) if callable(move) else tree_map(lambda t: t.to(device) if hasattr(t, "to") else t, tree)
    )
