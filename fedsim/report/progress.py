"""How runs get on, from their folders: rounds done, and whether one is done, failed, interrupted or under way."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedsim.config.yamlfile import read_yaml
from fedsim.errors import FedsimError

FILES = ("config.yaml", "metrics.jsonl", "clients.jsonl", "summary.json")
UNDER_WAY, STOPPED = "under way", "interrupted"
WORDS = {STOPPED: "interrupted: the same command goes on", "unreadable": "cannot be read"}
FIRST = ("failed", "unreadable", STOPPED, UNDER_WAY)  # shown before those that are done
MAX_LINES = 200  # runs shown one by one
TAIL = 65536  # bytes at the end of a file in which its last whole line is looked for

State = tuple[
    tuple[int, int], ...
]  # of each file: when it was changed, in ns, and its size; zeros without it


@dataclass(frozen=True)
class Standing:
    """How one run stands."""

    name: str
    status: str
    done: int  # rounds
    wanted: int  # rounds; 0: not known
    error: str = ""


class Progress:
    """Of all runs below ``dirs``, but none in ``out``; files that did not change are not read again."""

    def __init__(self, dirs: Sequence[Path], out: Path) -> None:
        self._dirs, self._out = dirs, out.absolute()
        self._seen: dict[Path, tuple[State, Standing]] = {}
        self.runs: list[Standing] = []

    def look(self) -> object:
        """Bring ``runs`` up to date; the answer changes with the files or with what is under way."""
        seen: dict[Path, tuple[State, Standing]] = {}
        for folder in self._folders():
            state = tuple(_stamp(folder / name) for name in FILES)
            before = self._seen.get(folder)
            standing = before[1] if before is not None and before[0] == state else self._read(folder)
            if standing.status in (UNDER_WAY, STOPPED) and not state[3][1]:  # no summary: is anyone writing?
                status = UNDER_WAY if held(folder / ".lock") else STOPPED
                standing = Standing(standing.name, status, standing.done, standing.wanted)
            seen[folder] = state, standing
        self._seen, self.runs = seen, [standing for _, standing in seen.values()]
        return {folder: (state, standing.status) for folder, (state, standing) in seen.items()}

    def html(self) -> str:
        """Counts, then a line a run: those that need attention first, those that are done last."""
        if not self.runs:
            return '<p class="soft">No run has begun yet.</p>'
        counts = {
            s: sum(one.status == s for one in self.runs) for s in (UNDER_WAY, "done", STOPPED, "failed")
        }
        text = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        order = {status: at for at, status in enumerate(FIRST)}
        runs = sorted(self.runs, key=lambda one: (order.get(one.status, len(order)), one.name))
        rows = "".join(map(_row, runs[:MAX_LINES]))
        more = f'<p class="soft">and {len(runs) - MAX_LINES} more</p>' if len(runs) > MAX_LINES else ""
        head = "".join(f'<th scope="col">{name}</th>' for name in ("run", "status", "rounds"))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<p>{text}</p><div class="scroll plain">{table}</div>{more}'

    def _folders(self) -> Iterator[Path]:
        for place in self._dirs:
            for folder, below, files in os.walk(place):
                if "metrics.jsonl" in files:
                    below.clear()
                    yield Path(folder)
                below[:] = sorted(
                    n for n in below if not n.startswith(".") and Path(folder, n).absolute() != self._out
                )

    def _read(self, folder: Path) -> Standing:
        summary: dict[str, Any] = {}
        try:
            wanted = read_yaml(folder / "config.yaml", recorded=True).get("rounds")
            if (folder / "summary.json").exists():
                summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            status, error = str(summary.get("status", UNDER_WAY)), str(summary.get("error") or "")
        except (FedsimError, OSError, ValueError, AttributeError) as problem:
            wanted, status, error = None, "unreadable", str(problem)
        done = _last_round(folder / "metrics.jsonl")
        return Standing(folder.name, status, done, wanted if isinstance(wanted, int) else 0, error)


def held(lock: Path) -> bool:
    """Whether another process has locked the file, as one that writes to a run folder does.

    The kernel's list is read where there is one: to try the lock would, for a moment, keep a run from beginning.
    """
    try:
        found = lock.stat()
        with Path("/proc/locks").open(encoding="ascii", errors="replace") as lines:
            listed = [fields[5] for line in lines if len(fields := line.split()) > 5 and fields[1] == "FLOCK"]
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        return f"{device}:{found.st_ino}" in listed
    except FileNotFoundError:
        if not lock.exists():
            return False
    except OSError:
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _last_round(path: Path) -> int:
    """The round of the last whole line of ``metrics.jsonl``; 0 without one."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["round"])
    return 0


def _row(one: Standing) -> str:
    status = escape(WORDS.get(one.status, one.status) + (f" ({one.error[:200]})" if one.error else ""))
    name = ' class="notes"' if one.status in ("failed", "unreadable", STOPPED) else ""
    of = f" of {one.wanted}" if one.wanted else ""
    bar = (
        f'<progress value="{min(one.done, one.wanted)}" max="{one.wanted}" aria-hidden="true"></progress> '
        if of
        else ""
    )
    return (
        f'<tr><th scope="row">{escape(one.name)}</th><td{name}>{status}</td><td>{bar}{one.done}{of}</td></tr>'
    )
