"""Clients that call a function before they train: to fail, to die, to be late."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from problems import Recorded, method
from torch import Tensor


@dataclass(frozen=True)
class Hooked:
    """A client that calls ``hook(job)`` before its own local training."""

    inner: Any
    hook: Callable[[Any], None]
    vectorisable = False  # the hook is no part of a step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def setup(self, task: Any, layout: Any) -> None:
        self.inner.setup(task, layout)

    def keeps(self, layout: Any) -> Any:
        return self.inner.keeps(layout)

    def init_state(self, layout: Any) -> dict[str, Tensor]:
        return self.inner.init_state(layout)

    def counts(self, job: Any) -> Any:
        return self.inner.counts(job)

    def fit(self, job: Any) -> Any:
        self.hook(job)
        return self.inner.fit(job)

    def evaluate(self, job: Any) -> Any:
        return self.inner.evaluate(job)

    def test(self, job: Any) -> Any:
        return self.inner.test(job)


def hooked(name: str, hook: Callable[[Any], None], *overrides: str) -> Recorded:
    """A configured strategy whose clients call ``hook`` first."""
    inner = method(name, *overrides)
    inner.client = Hooked(inner.client, hook)
    return Recorded(inner)


@dataclass(frozen=True)
class Fail:
    """Raise for some clients; with ``marker`` only the first time (the marker file then exists)."""

    clients: Sequence[int]
    error: type[BaseException] = ValueError
    marker: Path | None = None
    rounds: Sequence[int] | None = None

    def __call__(self, job: Any) -> None:
        if job.client not in self.clients or (self.rounds is not None and job.round not in self.rounds):
            return
        if self.marker is not None:
            if self.marker.exists():
                return
            self.marker.touch()
        raise self.error(f"client {job.client} has had enough")


@dataclass(frozen=True)
class Die:
    """Kill the worker's own process, once, while ``client`` trains; with ``node`` the whole Ray node that it is on."""

    client: int
    marker: Path
    always: bool = False
    node: bool = False

    def __call__(self, job: Any) -> None:
        if job.client == self.client and (self.always or not self.marker.exists()):
            self.marker.touch()
            if self.node:
                next(p for p in psutil.Process().parents() if p.name() == "raylet").kill()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Sleep:
    """Make chunks finish in another order than they were started."""

    seconds: Mapping[int, float]

    def __call__(self, job: Any) -> None:
        time.sleep(self.seconds.get(job.client, 0.0))
