"""The record of a run: ``metrics.jsonl``, ``clients.jsonl`` and ``summary.json`` in the run folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from fedsim.tracking.base import Row, RunInfo, Tracker
from fedsim.tracking.rows import ClientRows, from_json, packed, read_rows, to_json

__all__ = ["JsonlTracker", "read_rows"]

log = logging.getLogger(__name__)

HASHES = "hashes.jsonl"  # by exchange and client, with tracker.update_hashes=true
MAX_PENDING = 64 * 2**20  # bytes of rows held while the disk refuses them


class JsonlTracker(Tracker):
    """Writes a row a round and a line a round for each client that was asked, with its values by metric; always on.

    A round's lines are handed to the operating system before :meth:`round` returns, so a killed process
    loses at most the line being written. After a resume the rows of rounds that will be run again are cut
    off. When the disk refuses a write, ``OSError`` is raised each time while the rows wait in memory (up to
    ``MAX_PENDING`` bytes per file) and go out, in order, with the first write that succeeds.
    """

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._files: list[_Lines] = []

    def start(self, run: RunInfo) -> None:
        """Open the files, without rows after ``run.start_round`` and without an earlier part's summary."""
        self._run = run
        names = ["metrics.jsonl", "clients.jsonl"]
        if (run.dir / HASHES).exists() or (run.config.get("tracker") or {}).get("update_hashes"):
            names.append(HASHES)
        self._files = [_Lines(run.dir / name, run.start_round) for name in names]
        run.dir.mkdir(parents=True, exist_ok=True)
        (run.dir / "summary.json").unlink(missing_ok=True)
        for file in self._files:
            file.append(())

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Append the round, its clients first: a row in ``metrics.jsonl`` means a complete round."""
        metrics, per_client, *hashed = self._files
        try:
            per_client.append(clients)
            for file in hashed:
                file.append(clients.hashes if isinstance(clients, ClientRows) else ())
        finally:
            metrics.append((row,))

    def flush(self) -> None:
        """Write the rows that had to wait; ``OSError`` names the file whose rows still cannot be written."""
        for file in self._files:
            try:
                file.append(())
            except OSError as error:
                raise OSError(error.errno, error.strerror or str(error), str(file.path)) from error

    def end(self, summary: Row) -> None:
        """Write ``summary.json`` in one step: name, group and method of the run, then ``summary``."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            for file in self._files:
                file.append(())  # rows that had to wait
        finally:
            for file in self._files:
                file.close()
            facts = {"name": run.name, "group": run.group, "method": run.method, "rounds": run.rounds}
            replaced(run.dir / "summary.json", [to_json({**facts, **summary})])


class _Lines:
    """A growing file of JSON lines that never keeps half a batch."""

    def __init__(self, path: Path, last_round: int) -> None:
        self.path = path
        self._last_round = last_round
        self._file: FileIO | None = None  # opened late, and again after a failure
        self._end = 0  # bytes that are known to be whole lines
        self._partial = False  # there may be more bytes
        self._pending = b""

    def append(self, rows: Iterable[Row]) -> None:
        """Write what waits and then ``rows``; raises ``OSError`` and keeps them if the disk refuses."""
        full = len(self._pending) > MAX_PENDING
        if not full:
            text = rows.text() if isinstance(rows, ClientRows) else "".join(f"{t}\n" for t in packed(rows))
            self._pending += text.encode()
        if self._file is None:
            truncate(self.path, self._last_round)
            self._file = FileIO(str(self.path), "a")
            self._end = self._file.seek(0, os.SEEK_END)
        elif self._partial:
            self._file.truncate(self._end)  # an attempt before may have written a part
        left, self._partial = memoryview(self._pending), True
        while left:
            left = left[self._file.write(left) :]
        self._partial = False
        self._end += len(self._pending)
        self._pending = b""
        if full:
            raise OSError(
                f"{self.path}: more than {MAX_PENDING >> 20} MiB of rows had to wait; newer ones are lost"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def truncate(path: Path, last_round: int) -> None:
    """Remove, in one atomic step, unreadable lines and rows of rounds after ``last_round`` (0: all rows).

    Warns about unreadable lines other than a cut-off last one, and about rounds up to ``last_round`` that are
    missing.
    """
    if last_round == 0 or not path.exists():
        replaced(path, [])
        return
    unreadable: list[int] = []
    seen = number = 0

    def kept() -> Iterator[str]:
        nonlocal seen, number
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    at = int(from_json(line)["round"])
                except (ValueError, KeyError, TypeError):
                    unreadable.append(number)
                    continue
                if at <= last_round:
                    seen = max(seen, at)
                    yield line.decode().rstrip("\n")

    replaced(path, kept())
    if bad := [at for at in unreadable if at < number]:
        log.warning("%s: removed unreadable lines %s", path, bad)
    if path.name == "metrics.jsonl" and seen < last_round:
        log.warning("%s ends at round %d, but the run goes on after round %d", path, seen, last_round)


def replaced(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines anew, in one step; ``lines`` may be read from it meanwhile."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # what was begun takes no room
            temporary.unlink(missing_ok=True)
        raise
