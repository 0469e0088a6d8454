"""What an engine does: run calls on workers, in any order and place, and give results back in the order asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fedsim.engine.assignments import Plan
from fedsim.engine.worker import Worker
from fedsim.errors import ConfigError
from fedsim.task import room


class Engine(Protocol):
    """Runs ``Worker`` methods. The serial engine is the specification of all others."""

    workers: int
    remote: bool  # clients lie beyond a network, with data of their own: what is sent to them costs

    def start(self, plan: Plan) -> None:
        """Give the plan to every worker; may be called again with another plan."""

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """``Worker.method(shared, item)`` for every item; results in the order of ``items``.

        ``costs`` are relative durations; the longest are started first.
        """

    def close(self) -> None:
        """Release the workers."""


class SerialEngine:
    """Everything in this process, one item after the other."""

    workers = 1
    remote = False

    def __init__(self, worker: Callable[[Plan], Worker] = Worker) -> None:
        """``worker`` makes the one worker, for whoever looks at what it does."""
        self._make = worker
        self._worker: Worker | None = None
        self._threads: int | None = None

    def start(self, plan: Plan) -> None:
        """Build the one worker; torch threads are set for the run and restored by ``close``."""
        if self._threads is None:
            self._threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        self._worker = self._make(plan)
        room.rest()

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """Call in order."""
        call = getattr(self.worker, method)
        try:
            for item in items:
                yield call(shared, item)
        finally:
            room.rest()

    @property
    def worker(self) -> Worker:
        """The one that ``start`` made."""
        assert self._worker is not None, "start(plan) comes first"
        return self._worker

    def close(self) -> None:
        """Restore torch's thread count and drop the worker."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self._worker = self._threads = None


def pick_device(wish: str) -> str:
    """``auto`` is the GPU when there is one; a wish that cannot be met is an error."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"engine.device={wish}: torch sees no GPU here; use engine.device=auto or cpu")
    return wish
