"""``provenance.json``: where, when, with what and on what data each process worked on a run."""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
import resource
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.lazy import Mapped, Parts
from fedsim.data.trees import leaves
from fedsim.engine.base import pick_device
from fedsim.run.machine import machine

log = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
AT_ONCE = 32 << 20  # bytes of samples that are hashed before the run goes on; more are hashed beside it


class Record:
    """The entry of this process in a run's ``provenance.json``: written at the start, replaced at the end.

    A record that cannot be written costs a warning, never the run.
    """

    def __init__(
        self,
        folder: Path,
        config: DictConfig,
        key: str,
        data: FederatedData,
        done: int,
        workers: int,
        command: Sequence[str] | None = None,
    ) -> None:
        self._path = folder / PROVENANCE
        self._before = [_ended(entry) for entry in entries(folder)]
        self._lock = threading.Lock()
        self._entry: dict[str, Any] = {
            "rounds": {"from": done + 1, "to": None},
            "start": _now(),
            "end": None,
            "status": "running",
            "command": scrubbed(command or ["fedsim", *sys.argv[1:]]),
            "key": key,
            "engine": {"name": config.engine.name, "workers": workers},
            **machine(config.engine.threads, pick_device(config.engine.device)),
            "load": {"start": _load(), "end": None},
            "peak_rss_mib": None,
            "data_hash": None,
            "partition_hash": data.dealt.hash(),
        }
        large = _bytes(data.dataset) > AT_ONCE
        if not large:
            self._entry["data_hash"] = data_hash(data.dataset)
        self._write({})
        if large:
            self._hashing = threading.Thread(target=self._hash, args=(data.dataset,), daemon=True)
            self._hashing.start()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """How it ended: ``status`` and ``rounds`` of the run's summary."""
        if (hashing := getattr(self, "_hashing", None)) is not None:
            hashing.join()
        self._write(
            {
                "rounds": self._entry["rounds"] | {"to": summary.get("rounds")},
                "end": _now(),
                "status": summary.get("status", "failed"),
                "load": self._entry["load"] | {"end": _load()},
                "peak_rss_mib": _peak(),
            }
        )

    def _hash(self, dataset: Dataset) -> None:
        self._write({"data_hash": data_hash(dataset)})

    def _write(self, found: Mapping[str, Any]) -> None:
        with self._lock:
            self._entry |= found
            scratch = self._path.with_name(f".{PROVENANCE}.part")
            try:
                scratch.write_text(json.dumps([*self._before, self._entry], indent=1) + "\n")
                scratch.replace(self._path)
            except OSError as error:
                log.warning("%s could not be written (%s); the run goes on", self._path, error)


def entries(folder: Path) -> list[dict[str, Any]]:
    """What a run folder says of the processes that worked on it, the first one first; nothing if it says nothing."""
    try:
        found = json.loads((folder / PROVENANCE).read_text())
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def entry_of(folder: Path, number: int) -> dict[str, Any] | None:
    """The entry of the process that computed round ``number``, from 1: the last that began at or before it."""
    at = [e for e in entries(folder) if (e.get("rounds") or {}).get("from", 1) <= number]
    return at[-1] if at else None


def data_hash(dataset: Dataset) -> str | None:
    """Sha256 over dtype, shape and bytes of x and y of training and test samples, in order.

    ``None`` where samples are read one by one: to hash them would be to read them all. Of arrays in files, what tells
    their content apart.
    """
    found = hashlib.sha256()
    for part in (dataset.train, dataset.test):
        if part is None:
            continue
        if not isinstance(part, Samples):
            return None
        for leaf in (*leaves(part.x), *leaves(part.y)):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            for piece in leaf.parts if isinstance(leaf, Parts) else (leaf,):
                if isinstance(piece, Mapped):
                    found.update(piece.digest().encode())
                elif len(flat := piece.detach().cpu().contiguous().reshape(-1)):
                    found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def scrubbed(words: Sequence[str]) -> list[str]:
    """A command line without absolute paths or names of user and host."""
    home, here = str(Path.home()), str(Path.cwd())
    found = [re.sub(r"(?<![\w.~])/[^\s,=\[\]'\"]+", lambda m: _relative(m[0], here, home), w) for w in words]
    names = {socket.gethostname(): "HOST"}
    with suppress(Exception):  # no name for this user id
        names[getpass.getuser()] = "USER"
    for name, stand_in in names.items():
        if len(name) > 1:
            found = [re.sub(rf"(?<=/){re.escape(name)}(?=/|$)", stand_in, word) for word in found]
    return found


def _relative(path: str, here: str, home: str) -> str:
    if home != "/" and (path == home or path.startswith(f"{home}/")) and not path.startswith(f"{here}/"):
        return f"~{path.removeprefix(home)}"
    return os.path.relpath(path, here)


def _ended(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of before; this process has the folder to itself, so whoever was still at work has died."""
    return entry | ({"status": "killed"} if entry.get("status") == "running" else {})


def _bytes(dataset: Dataset) -> int:
    parts = [p for p in (dataset.train, dataset.test) if isinstance(p, Samples)]
    return sum(t.nbytes for p in parts for t in (*leaves(p.x), *leaves(p.y)) if isinstance(t, Tensor))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _load() -> float | None:
    """Mean number of busy processes over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _peak() -> int:
    """Most memory that this process has had resident so far, MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most >> (20 if sys.platform == "darwin" else 10)
