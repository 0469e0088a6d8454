"""What a client keeps between rounds, in files at its node, stamped with run, client and round.

The server says with every message which state is current; the node only ever adds files, whole or not at all. So an
update that was lost, came late or was refused changes nothing, and the same message may be worked on twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.flower.wire import Stamp
from fedsim.rng import hash_tensors
from fedsim.server.checkpoint import FORMAT
from fedsim.server.older import with_padding
from fedsim.task.layout import Layout

log = logging.getLogger(__name__)

_NAME = re.compile(r"state-(\d+)-(\d+)\.safetensors")
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a name within one folder, whoever sends it
_MADE = re.compile(r"[0-9a-f]{16}")  # as servers make them
DAY = 86400.0  # seconds


def run_folder(folder: Path, run: str, client: int) -> Path:
    """Where the files of one client in one run lie.

    Raises:
        ConfigError: for the name of a run that is none, such as a path.
    """
    if not isinstance(run, str) or not _RUN.fullmatch(run) or type(client) is not int or client < 0:
        raise ConfigError(
            f"run {run!r:.80}, client {client!r:.20}: no name of a run or no number; nothing is read or written for it"
        )
    return folder / run / f"client-{client}"


class StateFiles:
    """The states of one client in one run, in ``folder/<run>/client-<id>``."""

    def __init__(self, folder: Path, run: str, client: int, layout: Layout):
        self.folder, self._layout = run_folder(folder, run, client), layout
        self._about = {"run": run, "client": str(client)}

    def path(self, stamp: Stamp) -> Path:
        """File of the state made in that round and exchange."""
        return self.folder / f"state-{stamp[0]:06d}-{stamp[1]:03d}.safetensors"

    def read(self, stamp: Stamp) -> dict[str, Tensor] | None:
        """That state, or None if it is not there, not whole, of another run, or not what was written."""
        path = self.path(stamp)
        try:
            with safe_open(path, framework="pt") as f:
                about = dict(f.metadata() or {})
                format, wanted = about.pop("format", "1"), about.pop("content", "")
                if format not in ("1", str(FORMAT)) or about != self._meta(stamp):
                    return None
                state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if format == "1":
            return with_padding(state, self._layout)
        if _content(state) != wanted:
            log.error("%s is damaged: it does not hold what was written, and is not used", path)
            return None
        return state

    def write(self, stamp: Stamp, state: Mapping[str, Tensor]) -> None:
        """Add a state; the file appears by one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.path(stamp)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        kept = {k: v.contiguous() for k, v in state.items()}
        about = {**self._meta(stamp), "format": str(FORMAT), "content": _content(kept)}
        save_file(kept, scratch, metadata=about)
        with scratch.open("rb") as f:
            os.fsync(f.fileno())
        scratch.replace(target)

    def prune(self, round: int, current: Stamp | None) -> None:
        """Delete states of rounds before ``round`` but the one named ``current`` in it.

        States of the same round stay, and so does what the round began with: the server may do the round again.
        """
        if current is not None and current[0] >= round:
            return  # a later exchange of the round: what it began with is no longer named
        for path in self.folder.glob("state-*.safetensors"):
            found = _NAME.fullmatch(path.name)
            if found and int(found[1]) < round and path != (current and self.path(current)):
                path.unlink(missing_ok=True)

    def _meta(self, stamp: Stamp) -> dict[str, str]:
        return {**self._about, "round": str(stamp[0]), "exchange": str(stamp[1])}


def forget_old(folder: Path, days: float, but: str) -> list[str]:
    """Delete what is kept for runs that were last worked for more than ``days`` ago, except the run ``but``; their
    names. Nothing is touched that a run did not leave."""
    gone, before = list[str](), time.time() - days * DAY
    for run in folder.iterdir() if folder.is_dir() else ():
        if run.name == but or run.is_symlink() or not run.is_dir() or not _MADE.fullmatch(run.name):
            continue
        if _worked_for(run) < before:
            shutil.rmtree(run, ignore_errors=True)
            log.warning("state of run %s is deleted: it was last worked for over %g days ago", run.name, days)
            gone.append(run.name)
    return gone


def _worked_for(run: Path) -> float:
    """When anything in the folder was last written; never, where it is no run's or somebody is at work in it."""
    try:
        if all(re.fullmatch(r"client-\d+", part.name) and part.is_dir() for part in run.iterdir()):
            return max(path.lstat().st_mtime for path in (run, *run.rglob("*")))
    except OSError:  # what was listed is gone
        pass
    return math.inf


def _content(state: Mapping[str, Tensor]) -> str:
    """Sha256 over names, types, shapes and bytes."""
    names = sorted(state)
    head = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    text = json.dumps(head) + hash_tensors(state[name] for name in names)
    return hashlib.sha256(text.encode()).hexdigest()
