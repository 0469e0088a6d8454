"""Workers forked from the driver, which compute while Ray starts.

A forked process has the driver's modules, plan and data at once, so the first round waits for nothing. It does what
Ray's workers do, by the same pipes: its streams are heard, its death costs its chunk, a client that hangs can be ended.
Once Ray's workers are ready they take its place, between two exchanges (``fedsim.engine.ray.engine``); a run that is
over before that never needs them. Ray is not asked for in the first seconds, in which small runs end.

Not forked are: plans with more than one torch thread, whose pool does not survive a fork, or for a GPU; samples that
are read when they are needed, through files whose position parent and child would share; a process that has Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import warnings
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import Samples
from fedsim.data.lazy import Parts
from fedsim.data.trees import leaves
from fedsim.engine.assignments import Plan
from fedsim.engine.ray.hosting import Host
from fedsim.engine.ray.inplace import InPlace
from fedsim.engine.ray.transport.driver import Found, Transport
from fedsim.engine.ray.transport.receiver import Receiver
from fedsim.errors import EngineError

ACCEPT = 20.0  # seconds that a forked process has to open its pipes
START = "start"  # the call that builds the worker
DIE_WITH_PARENT = 1  # of prctl (2)


class Child:
    """A forked worker; ``pid`` is its process."""

    def __init__(self, plan: Plan, transport: Transport) -> None:
        offer, driver = transport.open(self), os.getpid()
        assert offer is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: of a process with threads
            self.pid = os.fork()
        if not self.pid:
            try:
                _die_with(driver)
                receiver = Receiver(_calls(plan))
                if receiver.accept(offer):
                    transport.leave()
                    receiver.serve()
            finally:
                os._exit(0)

    def end(self) -> None:
        """Kill it, whatever it does."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class Children:
    """The forked workers of a run, as many as it is to have."""

    def __init__(self, number: int, moved: InPlace) -> None:
        self._number, self._moved = number, moved
        self.transport = Transport()
        self.workers: list[Any] = []
        self._plan: Plan | None = None

    def start(self, plan: Plan) -> None:
        """Fork them. Raises what a worker raises that cannot be built."""
        self.close()
        self._plan = plan
        _share(plan, self._moved)
        waiting = {self._fork() for _ in range(self._number)}
        while waiting:
            came = self.transport.next()
            if not isinstance(came, Found):
                raise EngineError("a forked worker died when it was built; give engine.early=false")
            came.read()
            waiting.discard(came.call)

    def revive(self, worker: Child) -> Child:
        """Fork another in the place of one that has died."""
        self._drop(worker)
        self._fork()
        fresh: Child = self.workers[-1]
        return fresh

    def close(self) -> None:
        """End all."""
        for worker in list(self.workers):
            self._drop(worker)

    def _fork(self) -> int:
        """One more; the call that builds its worker."""
        assert self._plan is not None
        worker = Child(self._plan, self.transport)
        self.workers.append(worker)
        if not self.transport.accepted(worker, ACCEPT):
            raise EngineError("a forked worker could not be reached; give engine.early=false")
        return self.transport.send(worker, START, [], None)

    def _drop(self, worker: Child) -> None:
        self.workers.remove(worker)
        self.transport.close(worker)
        worker.end()


def possible(plan: Plan) -> bool:
    """Whether workers may be forked to compute ``plan``: see above."""
    parts = (plan.data.dataset.train, plan.data.dataset.test)
    in_memory = all(part is None or isinstance(part, Samples) for part in parts)
    return in_memory and plan.device == "cpu" and plan.threads == 1 and not torch.accelerator.is_available()


def _share(plan: Plan, moved: InPlace) -> None:
    """Move large samples to where Ray's workers will map them, before they are in more than one process."""
    for part in (plan.data.dataset.train, plan.data.dataset.test):
        for leaf in leaves((part.x, part.y)) if isinstance(part, Samples) else ():
            for piece in leaf.parts if isinstance(leaf, Parts) else (leaf,):
                if isinstance(piece, Tensor):
                    moved.place(piece)


def _calls(plan: Plan) -> Any:
    """In the child: what a receiver is to run."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C reaches the driver, who ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection would write to what is shared with the driver
    host = Host()

    def run(method: str, shared: list[Any], item: Any) -> Any:
        return host.begin(plan) if method == START else host.run(method, shared, item)

    return run


def _die_with(driver: int) -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(0)
