"""What lies on disk: runs, and what runs share (weights to start from, decoded samples), with status and size."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.data.cache import cache_dir
from fedsim.errors import LockedError
from fedsim.run.weightstore import MADE

log = logging.getLogger(__name__)

LOCK = ".lock"
UNDER_WAY = "under way"
STATUS = ("done", "failed", "interrupted", "killed", UNDER_WAY)
OF_A_SWEEP = ("multirun.yaml", "curves.png", "tune.json", "comparison.json")  # beside its runs
REPORT, PAGE, OF_A_REPORT = "report", "report.html", {".html", ".csv", ".tex", ".json", ".png"}
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl in which the last row is looked for


@dataclass(frozen=True)
class Holding:
    """A folder that fedsim has made."""

    kind: str  # run, weights (that runs start from), cache (decoded samples, embeddings)
    folder: Path
    status: str  # of a run one of STATUS; of the others done or under way
    bytes: int  # that it takes on disk
    method: str = ""
    seed: int | None = None
    rounds: int | None = None  # finished
    planned: int | None = None


def holdings(place: Path, cache: bool = True) -> Iterator[Holding]:
    """Everything in ``place`` (itself, or at any depth), runs first; with ``cache`` also what lies in the cache."""
    stores = list[Path]()
    for folder in _folders(place):
        if is_run(folder):
            yield _run(folder)
        else:
            stores.append(folder)
    if cache and cache_dir().is_dir() and not place.resolve().is_relative_to(cache_dir().resolve()):
        stores += sorted(f for f in cache_dir().iterdir() if is_entry(f))
    for folder in stores:
        kind = "cache" if is_entry(folder) else "weights"
        yield Holding(kind, folder, UNDER_WAY if busy(folder) else "done", size(folder))


def is_run(folder: Path) -> bool:
    """Whether it is a run folder, of a run that may just have begun."""
    config = folder / "config.yaml"
    if not config.is_file() or not any((folder / name).exists() for name in ("metrics.jsonl", LOCK)):
        return False
    if any((folder / name).exists() for name in ("provenance.json", "checkpoint")):
        return True
    text = _text(config)  # others have files of these names too
    return bool(_setting(text, "rounds") and _setting(text, "seed"))


def is_weights(folder: Path) -> bool:
    """Whether it holds weights that runs start from."""
    return (folder / MADE).is_file() or (folder.parent.name == "pretrained" and (folder / LOCK).is_file())


def is_entry(folder: Path) -> bool:
    """Whether it is an entry of the cache."""
    return folder.parent.resolve() == cache_dir().resolve() and folder.is_dir()


def busy(folder: Path) -> bool:
    """Whether another process is at work in a folder."""
    try:
        with alone(folder):
            return False
    except LockedError:
        return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others from starting work in a folder; nothing is made for it.

    Raises:
        LockedError: if another process is at work there.
    """
    try:
        file = (folder / LOCK).open("r+")
    except OSError:  # nobody ever locked it
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(folder) from None
        yield


def remove(holding: Holding) -> None:
    """Delete the folder.

    Raises:
        LockedError: if another process is at work in it; it stays as it is.
        OSError: if it cannot be deleted.
    """
    with alone(holding.folder):
        shutil.rmtree(holding.folder)


def tidy(place: Path) -> list[Path]:
    """Remove what a sweep wrote beside its runs, once none of them is left, and the folder if it is empty; what stays
    because it is nobody's is returned."""
    if not place.is_dir() or any(True for _ in _folders(place)):
        return []
    for name in OF_A_SWEEP:
        with suppress(OSError):
            (place / name).unlink()
    report = place / REPORT
    with suppress(OSError):
        if (report / PAGE).is_file() and not report.is_symlink():  # else a folder that somebody named so
            for path in report.iterdir():
                if path.suffix in OF_A_REPORT and not path.is_dir():
                    path.unlink()
        report.rmdir()
    with suppress(OSError):
        place.rmdir()
    return sorted(place.iterdir()) if place.is_dir() else []


def size(folder: Path) -> int:
    """Bytes that all files in it take on disk; those linked from elsewhere count here too."""
    total, seen = 0, set[tuple[int, int]]()
    for where, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                about = (Path(where) / name).lstat()
                if (about.st_dev, about.st_ino) not in seen:
                    seen.add((about.st_dev, about.st_ino))
                    total += about.st_blocks * 512
    return total


def _folders(place: Path) -> Iterator[Path]:
    """Runs and stores in ``place``, in order of their paths; there is nothing below them."""
    for folder, below, _ in os.walk(place, onerror=_say_unread):
        path = Path(folder)
        if is_run(path) or is_weights(path) or is_entry(path):
            below.clear()
            yield path
        below[:] = sorted(name for name in below if not name.startswith("."))


def _say_unread(error: OSError) -> None:
    log.warning("%s: cannot be read (%s)", error.filename, error.strerror)


def _run(folder: Path) -> Holding:
    summary, text = _json(folder / "summary.json"), _text(folder / "config.yaml")
    named = re.fullmatch(r"(.+)-s\d+-[0-9a-f]+(?:-[\d-]+)?", folder.name)
    method = summary.get("method") or _setting(text, "method") or (named[1] if named else "")
    seed, planned = _setting(text, "seed"), _setting(text, "rounds")
    status = str(summary.get("status", "killed"))
    return Holding(
        "run",
        folder,
        UNDER_WAY if busy(folder) else status if status in STATUS else "failed",
        size(folder),
        str(method),
        int(seed) if seed.isdecimal() else None,
        summary["rounds"]
        if isinstance(summary.get("rounds"), int) and status == "done"
        else _last_round(folder),
        int(planned) if planned.isdecimal() else None,
    )


def _setting(text: str, name: str) -> str:
    """A top-level setting of a run, read without parsing all of its configuration."""
    found = re.search(rf"^{name}: *(.*?) *$", text, re.MULTILINE)
    return "" if found is None or found[1] == "null" else found[1].strip("'\"")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_round(folder: Path) -> int:
    """The number of the last whole row of metrics.jsonl; 0 if there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        if line.endswith(b"}") and (found := re.match(rb'\{"round": (\d+)', line)):
            return int(found[1])
    return 0
