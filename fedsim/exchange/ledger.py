"""The ledger of releases, ``privacy.jsonl``: a line for each, on disk before the noisy sum is made, or, where clients
add noise of their own, before they are asked for it."""

from __future__ import annotations

import json
import logging
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from os.path import samestat
from pathlib import Path
from typing import Any

from fedsim.errors import CheckpointError

FILE = "privacy.jsonl"
log = logging.getLogger(__name__)


class Ledger:
    """What was released in a run. Rounds that are run again after a kill release the same numbers where noise is
    keyed, and count once; with noise of the operating system they are a second release, and count twice.

    Raises:
        CheckpointError: naming a line of the file that is none of a ledger.
    """

    def __init__(self, folder: Path, keyed: bool):
        self._path, self._keyed = folder / FILE, keyed
        self._seen, self._asked = list[tuple[int, int]](), list[list[int]]()
        for number, line in enumerate(_lines(self._path), 1):
            try:
                noted = json.loads(line)
                self._seen.append((int(noted["round"]), int(noted["exchange"])))
                self._asked.append([int(c) for c in noted.get("clients", [])])
            except (ValueError, LookupError, TypeError, AttributeError) as e:
                raise CheckpointError(
                    f"{self._path}: line {number} is no release ({line.decode(errors='replace')!r:.60}), so what was "
                    "spent can't be told. Put the file back, or give resume=never to start afresh"
                ) from e
        self._beside = ThreadPoolExecutor(1)
        self._file: FileIO | None = None
        self._at: os.stat_result | None = None  # which file it is
        self._begun: Future[None] | None = None

    def __len__(self) -> int:
        return len(set(self._seen)) if self._keyed else len(self._seen)

    def upto(self, round: int) -> int:
        """Releases up to ``round`` (from 1), those of later rounds that a kill threw away left out if they are the
        same again."""
        return len({one for one in self._seen if one[0] <= round}) if self._keyed else len(self._seen)

    def again(self, releases: int) -> list[int]:
        """Clients of lines after so many ``releases``, which a checkpoint does not know of; nobody where noise is
        keyed, since the same is released again."""
        return [] if self._keyed else [c for asked in self._asked[releases:] for c in asked]

    def after(self, round: int) -> int:
        """Releases once ``round`` (from 1) has made its own."""
        return self.upto(round - 1) + 1

    def write(self, round: int, exchange: int, **about: Any) -> None:
        """Note a release of ``round`` (from 1), and see to it that this outlives a crash."""
        self.begin(round, exchange, **about)
        self.settle()

    def begin(self, round: int, exchange: int, **about: Any) -> None:
        """:meth:`write`, while the caller goes on: who settles it before anything is released."""
        self.settle()
        self._seen.append((round, exchange))
        self._asked.append(about.get("clients", []))
        line = {"round": round, "exchange": exchange, "noise": "keyed" if self._keyed else "os", **about}
        file, rest = self._opened(), json.dumps(line).encode() + b"\n"
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]
        self._begun = self._beside.submit(os.fsync, file.fileno())

    def _opened(self) -> FileIO:
        """The file, to append to: anew where it lies there no more, and without what a crash left of a line."""
        if self._file is not None and self._at is not None:
            if self._path.exists() and samestat(self._path.stat(), self._at):
                return self._file
            log.warning("%s was taken away: a new one holds the releases from now on alone", self._path)
        whole = self._path.read_bytes().rfind(b"\n") + 1 if self._path.is_file() else None
        try:  # without a buffer: what could not be written is not tried again
            self._file = FileIO(self._path, "ab")
        except (PermissionError, IsADirectoryError) as e:
            raise CheckpointError(
                f"{self._path} cannot be written ({e.strerror}), and nothing is released without its line there; put "
                "that right and type the same command again"
            ) from e
        weakref.finalize(self, self._file.close)
        if whole is not None:
            self._file.truncate(whole)
        self._at = self._path.stat()
        return self._file

    def settle(self) -> None:
        """Wait until what was begun is on disk.

        Raises:
            OSError: as the writing did.
        """
        if self._begun is not None:
            self._begun.result()

    def check(self, releases: int) -> None:
        """Refuse to go on where the ledger has lost releases that the checkpoint knows of.

        Raises:
            CheckpointError: naming the file.
        """
        if len(self) < releases:
            raise CheckpointError(
                f"{self._path} knows of {len(self)} releases, the checkpoint of {releases}: what was spent can't be "
                "told. Put the file back, or give resume=never to start afresh"
            )


def _lines(path: Path) -> list[bytes]:
    """Whole lines of the file; the last may have been cut by a crash, before its release was made."""
    if not path.is_file():
        return []
    return [line for line in path.read_bytes().split(b"\n")[:-1] if line]
