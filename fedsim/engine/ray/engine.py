"""Resident Ray actors as workers: the message is put into shared memory once, chunks go out longest first.

Workers hold no state of the run, so a lost one costs only the chunk it was working on, which is done again elsewhere.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.config.schema import RayConfig
from fedsim.engine.assignments import Plan
from fedsim.engine.ray.cluster import connect, on_shutdown, ours
from fedsim.engine.ray.line import Ends, Line, Listener, Shared
from fedsim.engine.ray.mail import Box, Mail, Place, Probe
from fedsim.engine.ray.post import Exchange, Found, NotReady, PostOffice
from fedsim.engine.worker import Worker
from fedsim.errors import EngineError

ATTEMPTS = 4  # times a chunk is started before its loss is given up
PATIENCE = 30  # seconds that a lost worker has to come back
AHEAD = 2  # calls in flight per worker, so that none waits for the driver
LAST = 2  # chunks per worker at an exchange's end that wait for a free worker, so that all end together
_idle: list[Any] = []  # actors of finished runs of this process: a new worker process costs seconds


class _Actor:
    """A worker process. Its methods take the name of a ``Worker`` method."""

    _worker: Worker | None

    def __init__(self) -> None:
        _share_tensors()
        self.stop()

    def start(self, plan: Plan, probe: Probe | None, ends: Ends | None) -> bool:
        """Build the worker; whether mail from the driver reaches it, and ``serve`` will hear its calls."""
        torch.set_num_threads(plan.threads)
        self._worker = Worker(plan)
        if ends is None or not self._box.reaches(probe):
            return False
        self._listener = Listener(ends)
        return True

    def stop(self) -> None:
        self._worker = None
        self._box = Box()
        self._parts: dict[int, tuple[int, Any]] = {}

    def serve(self) -> None:
        """Answer the calls that come by line, until it ends."""

        def read(where: tuple[Place, Mail]) -> Any:
            return self._box[where[0]].read(where[1])

        try:
            while (call := self._listener.next()) is not None:
                try:
                    result = self._run(call.method, self._open(call.shared, read), read(call.item))
                    self._listener.answer(call.number, self._box[call.out].write(result))
                    del result
                except Exception as e:
                    self._listener.answer(call.number, None, e)
        finally:
            self._listener.close()

    def call(self, method: str, shared: Shared, item: Any) -> Any:
        """``shared`` holds references, each with a number: unpacked here, once for all its items."""
        import ray

        return self._run(method, self._open(shared, ray.get), item)

    def _open(self, shared: Shared, read: Callable[[Any], Any]) -> Any:
        for i, (number, where) in enumerate(shared):
            if i not in self._parts or self._parts[i][0] != number:
                self._parts[i] = number, read(where)
        value, *standing = (self._parts[i][1] for i in range(len(shared)))
        return replace(value, standing=standing[0]) if standing else value

    def _run(self, method: str, shared: Any, item: Any) -> Any:
        if self._worker is None:
            raise NotReady
        return getattr(self._worker, method)(shared, item)


class RayEngine:
    """Actors on this machine or on a cluster (``engine.address``)."""

    remote = False

    def __init__(self, config: RayConfig):
        import ray

        self._ray = ray
        self._config = config
        connect(config)
        _share_tensors()
        resources = _own_resources() if ours() else ray.cluster_resources()
        total = int(resources.get("CPU", 1))
        self.workers = config.workers or max(1, total)
        gpus = resources.get("GPU", 0) if config.device != "cpu" else 0
        # A Ray of our own is ours to fill; on somebody's cluster each worker asks for a CPU, and must get one.
        self._options = {"num_cpus": 0 if ours() else 1, "num_gpus": gpus / self.workers}
        if not ours() and self.workers > total:
            raise EngineError(
                f"engine.workers={self.workers}, but the cluster has {total} CPUs; "
                "start fewer workers or join a larger one"
            )
        reuse = _idle if not gpus else []
        self._actors = [reuse.pop() if reuse else self._new_actor() for _ in range(self.workers)]
        self._plan: Any = None
        self._office = PostOffice(ray)
        self._threads: int | None = None
        on_shutdown(_idle.clear)

    def start(self, plan: Plan) -> None:
        """Put the plan (data included) into shared memory once; workers map it.

        The server computes with as many torch threads as a worker: they change the bits of what strategies do too.
        """
        if self._threads is None:
            self._threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        self._plan = self._ray.put(plan)
        load = Counter(dict.fromkeys(self._actors, 0))
        for actor, started in [(a, self._start(a)) for a in self._actors]:
            try:
                self._finish_start(actor, *started)
            except self._ray.exceptions.RayActorError:  # died since its last run
                self._revive(actor, load)
            except self._ray.exceptions.RayTaskError as e:
                raise e.as_instanceof_cause() from None

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """Results in the order of ``items``, each as soon as it and all before it are there."""
        order = sorted(range(len(items)), key=lambda i: -costs[i]) if costs else list(range(len(items)))
        ready: dict[int, Any] = {}
        following = 0
        post = self._office.exchange(method, shared)
        for index, result in self._unordered(post, items, order):
            ready[index] = result
            while following in ready:
                yield ready.pop(following)
                following += 1

    def close(self) -> None:
        """Keep the worker processes, emptied, for the next run of this process; ``cluster.shutdown`` ends them."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None
        self._office.close()
        for actor in self._actors:
            actor.stop.remote()
        if not self._options["num_gpus"]:
            _idle.extend(self._actors)
        self._actors = []
        self._office = PostOffice(self._ray)

    def _unordered(self, post: Exchange, items: Sequence[Any], order: list[int]) -> Iterator[tuple[int, Any]]:
        todo, tries, busy = order[::-1], Counter[int](), dict[int, tuple[int, Any]]()
        load = Counter(dict.fromkeys(self._actors, 0))

        def send() -> None:
            while todo and min(load.values()) < (AHEAD if len(todo) > LAST * len(load) else 1):
                index, actor = todo.pop(), min(load, key=lambda a: load[a])
                tries[index] += 1
                load[actor] += 1
                busy[post.send(actor, items[index])] = index, actor

        while todo or busy:
            send()
            came = post.next(self._config.timeout)
            if came is None:
                names = ", ".join(str(i) for i, _ in busy.values())
                raise EngineError(
                    f"chunks {names} took longer than engine.timeout={self._config.timeout} s; "
                    "raise it or find the client"
                )
            if isinstance(came, Found):
                index, actor = busy.pop(came.call)
                load[actor] -= 1
                send()  # before its answer is read, so that the worker need not wait for that
                yield index, came.read()
                continue
            lost = [call for call, (_, actor) in busy.items() if actor is came.actor]
            for index, _ in [busy.pop(call) for call in lost]:
                if tries[index] >= ATTEMPTS:
                    who = getattr(items[index], "clients", None)
                    raise EngineError(
                        f"chunk {index}{f' (clients {list(who)})' if who else ''} was lost {ATTEMPTS} times with its "
                        "worker (killed, out of memory?); "
                        "use fewer engine.workers or more, smaller engine.chunks"
                    )
                todo.append(index)
            self._revive(came.actor, load)
        post.close()

    def _revive(self, actor: Any, load: Counter[Any]) -> None:
        """Give a restarted actor its plan, or replace one that does not come back; with its node gone, do without."""
        errors, end = self._ray.exceptions, time.monotonic() + PATIENCE
        self._office.connect(actor, None)
        while time.monotonic() < end:
            try:
                self._finish_start(actor, *self._start(actor), timeout=PATIENCE)
                load[actor] = 0
                return
            except errors.ActorDiedError:
                break
            except (errors.RayActorError, TimeoutError):
                time.sleep(0.1)
        del load[actor]
        self._actors.remove(actor)
        self._ray.kill(actor)
        if not self._actors or time.monotonic() < end:  # there may be room for another
            fresh = self._new_actor()
            try:
                self._finish_start(fresh, *self._start(fresh), timeout=2 * PATIENCE)
                self._actors.append(fresh)
                load[fresh] = 0
            except (errors.RayActorError, TimeoutError):
                self._ray.kill(fresh)
        if not self._actors:
            raise EngineError(
                "no worker is left (nodes lost, out of memory?); the same command goes on from the last finished round"
            )
        if len(self._actors) < self.workers:
            warnings.warn(f"a worker is lost for good; {len(self._actors)} go on", stacklevel=2)

    def _start(self, actor: Any) -> tuple[Any, Line | None]:
        """Send the plan, and a line that a worker on this machine may pick up."""
        line = Line() if self._office.probe else None
        return actor.start.remote(self._plan, self._office.probe, line and line.ends), line

    def _finish_start(self, actor: Any, answer: Any, line: Line | None, timeout: float | None = None) -> None:
        try:
            near = self._ray.get(answer, timeout=timeout)
        except BaseException:
            if line is not None:
                line.close()
            raise
        if near and line is not None:
            line.established()
            self._office.connect(actor, line)
            actor.serve.remote()
        elif line is not None:
            line.close()

    def _new_actor(self) -> Any:
        return self._ray.remote(_Actor).options(**self._options, max_restarts=-1, max_task_retries=0).remote()


def _own_resources() -> dict[str, float]:
    """What a Ray of our own has: this machine. Asking Ray takes a second after its start."""
    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def _share_tensors() -> None:
    """Pickle CPU tensors as numpy arrays, so that both sides of a transfer map shared memory instead of copying."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_to_numpy, deserializer=_from_numpy)
    ray.util.register_serializer(torch.nn.Parameter, serializer=_from_parameter, deserializer=_to_parameter)


def _to_numpy(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().numpy()


def _from_numpy(a: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": every receiver treats these as read-only
        return torch.from_numpy(a)


def _from_parameter(p: torch.nn.Parameter) -> tuple[Any, bool]:
    return _to_numpy(p), p.requires_grad


def _to_parameter(parts: tuple[Any, bool]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(parts[0].copy()), requires_grad=parts[1])
