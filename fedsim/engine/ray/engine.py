"""Workers in processes of their own: the message is put into shared memory once, chunks go out longest first.

Any process may compute a chunk, since its borders and its place in the sum are the cohort's: processes forked from the
driver do until Ray's workers are ready (``forked``, ``actors``), and a chunk whose worker dies is done again elsewhere.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsim.config.schema import RayConfig
from fedsim.engine.assignments import Plan
from fedsim.engine.cores import available_cores
from fedsim.engine.ray import cluster, forked
from fedsim.engine.ray.actors import Actors
from fedsim.engine.ray.forked import Children
from fedsim.engine.ray.inplace import InPlace
from fedsim.engine.ray.said import Speaker
from fedsim.engine.ray.sending import refuse_patched
from fedsim.engine.ray.transport.driver import Found, Shared
from fedsim.errors import ConfigError, EngineError, shadow

ATTEMPTS = 4  # times a chunk is started before its loss is given up
AHEAD = 2  # calls in flight per worker, so that none waits for the driver
LAST = 2  # chunks per worker at an exchange's end that wait for a free worker, so that all end together
ALONE = 2.0  # seconds that forked workers compute before Ray is started: what is done by then never needs it


class RayEngine:
    """Workers on this machine or on a cluster (``engine.address``)."""

    remote = False

    def __init__(self, config: RayConfig):
        self._config, self._moved = config, InPlace()
        self._actors: Actors | None = None
        self._crew: Actors | Children | None = None  # those that compute
        cluster.check_workers(config)
        if cluster.early(config):
            self.workers = config.workers or available_cores()
        else:
            self._ask_ray()
        self._plan: Plan | None = None
        self._speaker = Speaker()
        self._standing: Shared | None = None
        self._threads: int | None = None
        self._began = 0.0

    def start(self, plan: Plan) -> None:
        """Give the plan to the workers, who share its data.

        The server computes with as many torch threads as a worker: they change the bits of what strategies do too.
        """
        if self._threads is None:
            self._threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        self._plan, self._began = plan, time.monotonic()
        if self._actors is None and forked.possible(plan):
            refuse_patched(plan)
            if (hidden := shadow(Path.cwd())) is not None:
                raise ConfigError(hidden)
            if not isinstance(self._crew, Children):
                self._crew = Children(self.workers, self._moved)
            try:
                self._crew.start(plan)
                return
            except OSError:  # no memory, or no process, is left for a fork
                self._crew.close()
        actors = self._actors or self._ask_ray()
        actors.send(plan)
        self._turn_to(actors)

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """Results in the order of ``items``, each as soon as it and all before it are there."""
        order = sorted(range(len(items)), key=lambda i: -costs[i]) if costs else list(range(len(items)))
        ready: dict[int, Any] = {}
        following = 0
        self._hand_over()
        for index, result in self._unordered(method, self._shared(shared), items, order):
            ready[index] = result
            while following in ready:
                yield self._speaker.result(ready.pop(following))
                following += 1

    def close(self) -> None:
        """End forked workers; keep Ray's for the next run of this process."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None
        for crew in {id(crew): crew for crew in (self._crew, self._actors) if crew is not None}.values():
            crew.close()
        self._crew = self._actors = self._standing = None

    def _ask_ray(self) -> Actors:
        self._actors = Actors(self._config, self._moved)
        self.workers = self._actors.number
        return self._actors

    def _hand_over(self) -> None:
        """Between two exchanges: a step towards Ray's workers, if forked ones have computed long enough."""
        if not isinstance(self._crew, Children) or time.monotonic() - self._began < ALONE:
            return
        if self._actors is None:
            try:
                if not cluster.starts(self._config):
                    return
                actors = self._ask_ray()
            except EngineError as error:
                self._began = math.inf
                warnings.warn(f"{error}; the workers forked from this process go on", stacklevel=2)
                return
            assert self._plan is not None
            actors.send(self._plan)
        if self._actors is not None and self._actors.ready:
            self._turn_to(self._actors)

    def _turn_to(self, actors: Actors) -> None:
        """Ray's workers compute from now on."""
        actors.settle()
        if isinstance(self._crew, Children):
            self._crew.close()
        self._crew, self._standing = actors, None

    def _shared(self, value: Any) -> list[Shared]:
        """``value`` to be sent once; its part ``standing`` only when it is another object than last time."""
        standing = getattr(value, "standing", None)
        if standing is None:
            return [Shared(value)]
        if self._standing is None or self._standing.value is not standing:
            self._standing = Shared(standing)
        return [Shared(replace(value, standing=None)), self._standing]

    def _unordered(
        self, method: str, shared: list[Shared], items: Sequence[Any], order: list[int]
    ) -> Iterator[tuple[int, Any]]:
        crew = self._crew
        assert crew is not None, "start(plan) comes first"
        transport = crew.transport
        todo, tries, busy = order[::-1], Counter[int](), dict[int, tuple[int, Any]]()
        load = Counter(dict.fromkeys(crew.workers, 0))

        def send() -> None:
            while todo and min(load.values()) < (AHEAD if len(todo) > LAST * len(load) else 1):
                index, worker = todo.pop(), min(load, key=lambda w: load[w])
                tries[index] += 1
                load[worker] += 1
                busy[transport.send(worker, method, shared, items[index])] = index, worker

        while todo or busy:
            send()
            came = transport.next(self._config.timeout)
            if came is None:
                names = ", ".join(_chunk(index, items) for index, _ in busy.values())
                raise EngineError(
                    f"{names} took longer than engine.timeout={self._config.timeout} s; raise it or find the client"
                )
            if isinstance(came, Found):
                if came.call in busy:  # not of an exchange that was given up
                    index, worker = busy.pop(came.call)
                    load[worker] -= 1
                    send()  # before its answer is read, so that the worker need not wait for that
                    yield index, came.read()
                continue
            lost = [call for call, (_, worker) in busy.items() if worker is came.worker]
            for index, _ in [busy.pop(call) for call in lost]:
                if tries[index] >= ATTEMPTS:
                    raise EngineError(
                        f"{_chunk(index, items)} was lost {ATTEMPTS} times with its worker (killed, out of memory?); "
                        "use fewer engine.workers or more, smaller engine.chunks"
                    )
                todo.append(index)
            load.pop(came.worker, None)
            if (instead := crew.revive(came.worker)) is not None:
                load[instead] = 0


def _chunk(index: int, items: Sequence[Any]) -> str:
    """A chunk's name in messages."""
    clients = getattr(items[index], "clients", None)
    return f"chunk {index}" + (f" (clients {list(clients)})" if clients else "")
