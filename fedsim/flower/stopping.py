"""How a ServerApp ends before its run does: told by Flower to stop, or because another one has the folder already."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from fedsim.errors import LockedError

LOCK = ".deployment"


class Stopped(KeyboardInterrupt):
    """``flwr stop``, or SIGTERM: like Ctrl-C in a simulation, the run is interrupted; submitted again, it goes on."""


class StoppableGrid:
    """A grid whose calls raise :class:`Stopped` once Flower says that the run is not running any more."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._grid, name)
        return _stopped(found, name) if callable(found) else found


def _stopped(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RunNotRunningException:
            raise Stopped("flwr stop") from None

    asked.__name__ = name
    return asked


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, signals by which Flower ends this process raise :class:`Stopped`; then they do what Flower wants.

    Flower's own handlers leave by ``sys.exit``, which would look like a failure of the run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came, before = list[int](), dict[int, Any]()

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()
        raise Stopped(f"flwr stop, or {signal.Signals(number).name}")

    before |= {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stopped:
        restore()
        os.kill(os.getpid(), came[0] if came else signal.SIGINT)
        raise  # unless the handler has left
    finally:
        restore()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else deploys into ``folder`` within; LockedError if somebody does already.

    The run's own lock comes too late: nodes are waited for, and noted in the folder, before it is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(folder) from None
        yield
