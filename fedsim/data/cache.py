"""Decoded arrays on disk: written once and atomically, memory-mapped on every later use."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from fedsim.errors import DataError

Arrays = dict[str, np.ndarray]

_off: ContextVar[bool] = ContextVar("_off", default=False)
_FORMAT = "2"  # raise when what is written changes, so that older entries are not reused


def cache_dir() -> Path:
    """Folder of decoded data: ``$FEDSIM_CACHE``, or ``~/.cache/fedsim``."""
    given = os.environ.get("FEDSIM_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fedsim"


@contextmanager
def not_cached() -> Iterator[None]:
    """Inside, decoded data are not left on disk, unless ``FEDSIM_CACHE`` says where: for machines on which samples are
    somebody's own."""
    token = _off.set(not os.environ.get("FEDSIM_CACHE"))
    try:
        yield
    finally:
        _off.reset(token)


def fingerprint(files: Iterable[Path]) -> tuple[str, ...]:
    """Name, size (bytes) and modification time (ns) of each file: stands in for hashing its content."""
    stats = [(file.name, file.stat()) for file in files]
    return tuple(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def cached(name: str, key: Iterable[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``build`` returns, or those stored in ``cache_dir()/<name>-<hash of key>/``.

    Returned arrays are copy-on-write memory maps: processes on one machine share their pages. Two processes
    that build the same entry at once both succeed; an unreadable entry is built again. Raises ``DataError``
    when the folder cannot be written.
    """
    if _off.get():
        return build()
    digest = hashlib.sha256("\n".join((_FORMAT, name, *key)).encode()).hexdigest()[:20]
    entry = cache_dir() / f"{name}-{digest}"
    if entry.is_dir():
        try:
            return _load(entry)
        except (ValueError, EOFError, OSError):
            shutil.rmtree(entry, ignore_errors=True)
    arrays = build()
    try:
        _store(entry, arrays)
    except OSError as error:
        raise DataError(
            f"cannot write decoded data to {entry.parent} ({error}); set FEDSIM_CACHE=<a writable folder>"
        ) from error
    return _load(entry)


def _load(entry: Path) -> Arrays:
    files = sorted(entry.glob("*.npy"))
    if not files:
        raise ValueError(f"empty cache entry {entry}")
    return {file.stem: np.load(file, mmap_mode="c", allow_pickle=False) for file in files}


def _store(entry: Path, arrays: Arrays) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array, allow_pickle=False)
        try:
            scratch.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster, and its entry is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
