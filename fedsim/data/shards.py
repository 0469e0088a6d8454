"""Which samples each client holds: two arrays, however many clients there are."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import DataError

STAND_INS = 8  # of a client and class


def put(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write arrays to an ``.npz`` file, whole or not at all; what was begun on a full disk takes no room."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as out:
            np.savez(out, **arrays)
        scratch.replace(target)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, eq=False)
class Shards:
    """The samples of m clients: ``index[offsets[i]:offsets[i + 1]]`` are client i's rows of the data set.

    ``index`` is int64 ``(total,)``; ``offsets`` is int64 ``(m + 1,)``, from 0 to ``total``, never falling.
    """

    index: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        ends = self.offsets
        if self.index.dtype != np.int64 or ends.dtype != np.int64 or self.index.ndim != 1 or ends.ndim != 1:
            raise DataError(
                f"shards need one-dimensional int64 arrays, got index {self.index.dtype} "
                f"{self.index.shape} and offsets {ends.dtype} {ends.shape}"
            )
        if not len(ends) or ends[0] != 0 or ends[-1] != len(self.index) or (np.diff(ends) < 0).any():
            raise DataError(f"shard offsets must rise from 0 to {len(self.index)}, the length of index")

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Shards:
        """From one index array per client."""
        sizes = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
        index = (
            np.concatenate(parts).astype(np.int64, copy=False) if len(parts) else np.empty(0, dtype=np.int64)
        )
        return cls(index, _offsets(sizes))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, client: int) -> np.ndarray:
        """Rows of one client, a view; ``IndexError`` outside 0..m-1."""
        if not 0 <= client < len(self.offsets) - 1:
            raise IndexError(f"client {client} of {len(self)}")
        first, end = self.offsets[client : client + 2].tolist()
        return self.index[first:end]

    def whose(self, row: int) -> str:
        """Who holds a row of the data set, for messages: its client and where it lies among that client's samples."""
        at = np.flatnonzero(self.index == row)
        if not len(at):
            return f"the training set, row {row}"
        client = int(np.searchsorted(self.offsets, at[0], side="right")) - 1
        return f"client {client}, row {int(at[0] - self.offsets[client])} (row {row} of all)"

    @property
    def sizes(self) -> np.ndarray:
        """Samples per client, int64 ``(m,)``."""
        return np.diff(self.offsets)

    def size(self, client: int) -> int:
        """Samples of one client."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def only(self, there: np.ndarray) -> Shards:
        """The same of clients that are ``there`` ``(m,)`` alone; others have no samples."""
        sizes = self.sizes
        return Shards(self.index[np.repeat(there, sizes)], _offsets(sizes * there))

    def counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Samples per client and class, int64 ``(m, num_classes)``, for labels ``(N,)`` of the whole data
        set."""
        owner = np.repeat(np.arange(len(self)), self.sizes)
        cells = owner * num_classes + labels[self.index]
        return np.bincount(cells, minlength=len(self) * num_classes).reshape(len(self), num_classes)

    def hash(self) -> str:
        """SHA-256 (hex) of both arrays as little-endian bytes: names the partition."""
        digest = hashlib.sha256(len(self).to_bytes(8, "little"))
        for array in (self.offsets, self.index):
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both arrays to an ``.npz`` file, whole or not at all."""
        put(path, index=self.index, offsets=self.offsets)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Shards:
        """Read what ``save`` wrote; ``DataError`` when that is not what the file holds."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                if "held" in stored:
                    return Stated.of_counts(stored["held"])
                return Shards(stored["index"], stored["offsets"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: expected a partition with arrays index and offsets ({error})"
            ) from error


@dataclass(frozen=True, eq=False)
class Stated(Shards):
    """Of samples that lie elsewhere: how many of each class each client says it has, ``held`` int64 ``(m, C)``.

    ``index`` names stand-ins, no more than ``STAND_INS`` of a client and class, in data with a row for each class: no
    memory hangs on what is said.
    """

    held: np.ndarray

    @staticmethod
    def of_counts(held: np.ndarray) -> Stated:
        """From samples per client and class; one column where there are no classes."""
        few = np.minimum(held, STAND_INS)
        classes = np.tile(np.arange(held.shape[1], dtype=np.int64), len(held))
        return Stated(np.repeat(classes, few.ravel()), _offsets(few.sum(1)), held)

    @property
    def sizes(self) -> np.ndarray:
        """See ``Shards``."""
        total: np.ndarray = self.held.sum(1)
        return total

    def size(self, client: int) -> int:
        """See ``Shards``."""
        return int(self.held[client].sum())

    def only(self, there: np.ndarray) -> Shards:
        """See ``Shards``."""
        return Stated.of_counts(self.held * there[:, None])

    def counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See ``Shards``; what was said."""
        return self.held

    def hash(self) -> str:
        """SHA-256 (hex) of what was said."""
        return hashlib.sha256(np.ascontiguousarray(self.held, dtype="<i8").tobytes()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """See ``Shards``."""
        put(path, held=self.held)


def holdout(
    shards: Shards, fraction: float, rng_for_client: Callable[[int], np.random.Generator]
) -> tuple[Shards, Shards]:
    """Set aside a random ``fraction`` of every client's samples as its own test set.

    Client i with n samples gives floor(fraction * n) of them, but at least one if n >= 2 and ``fraction`` >
    0, drawn by ``rng_for_client(i)``. Where a partition repeats samples, a client's test rows are distinct
    and every copy of them leaves its training rows; another client may still train on them.

    Returns:
        Training and test shards, each sorted within a client.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction is {fraction}; give 0 <= fraction < 1")
    if fraction == 0:
        return shards, Shards(np.empty(0, dtype=np.int64), np.zeros(len(shards) + 1, dtype=np.int64))
    train, test = [], []
    for client in range(len(shards)):
        part = shards.part(client)
        distinct = np.unique(part)
        wanted = max(int(fraction * len(part)), 1)
        chosen = np.zeros(len(distinct), dtype=bool)
        if len(distinct) >= 2:
            count = min(wanted, len(distinct) - 1)
            chosen[rng_for_client(client).permutation(len(distinct))[:count]] = True
        test.append(distinct[chosen])
        train.append(np.sort(part[~np.isin(part, distinct[chosen])]))
    return Shards.of(train), Shards.of(test)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)))
