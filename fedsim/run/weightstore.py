"""A folder of weights that are made once: whole or not at all, by one process at a time, and checked when read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.run.made import absent, remove

log = logging.getLogger(__name__)

WEIGHTS, MADE = "weights.safetensors", "made.json"


class Stored(NamedTuple):
    """Tensors by name, and what is said of them."""

    state: dict[str, Tensor]
    made: dict[str, Any]


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make ``folder``, and wait until no other process is at work in it; a process that dies lets others in.

    What is refused, or fails, before anything was finished there leaves no folder behind that it made.
    """
    made = absent(folder)
    with _locked(folder, say):
        try:
            yield
        except BaseException:
            if not (folder / MADE).exists():
                remove(folder, made)
            raise


@contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror}); give another out=..."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                say(f"waiting for another process that makes {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _still(folder / ".lock", lock.fileno()):
                yield
                return


def _still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at ``path``: whoever held it may have cleared it away."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def read(folder: Path) -> Stored | None:
    """What lies in the folder; ``None`` if nothing was finished there, or, which is said, if it was changed since."""
    try:
        made = json.loads((folder / MADE).read_text())
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() == made["sha256"]:
            return Stored(load(content), made)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read (%s); made again", folder, error)
        return None
    log.warning("%s: not the weights that were written, by their hash; made again", folder / WEIGHTS)
    return None


def write(folder: Path, found: Stored) -> None:
    """The weights first, then what is said of them, each in one piece; what a dead process began is cleared away."""
    for begun in folder.glob(".*.part"):
        begun.unlink()
    content = save(found.state)
    found.made["sha256"] = hashlib.sha256(content).hexdigest()
    for name, data in ((WEIGHTS, content), (MADE, (json.dumps(found.made, indent=2) + "\n").encode())):
        scratch = folder / f".{name}.part"
        with scratch.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(folder / name)
