"""Which processes are still there."""

from __future__ import annotations

import time

import psutil


def wait_until_gone(pids: set[int]) -> None:
    """Ray's own two agents notice a dead raylet only after a minute; everything else ends at once."""
    deadline = time.monotonic() + 30
    while (left := {p: command(p) for p in alive(pids)}) and time.monotonic() < deadline:
        if all("Agent" in name for name in left.values()):
            return
        time.sleep(0.2)
    assert not left


def command(pid: int) -> str:
    try:
        return psutil.Process(pid).cmdline()[0]
    except (psutil.Error, IndexError):
        return "gone"


def descendants(pid: int) -> set[int]:
    return {p.pid for p in psutil.Process(pid).children(recursive=True)}


def alive(pids: set[int]) -> set[int]:
    return {p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE}
