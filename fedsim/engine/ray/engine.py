"""Resident Ray actors as workers: the message is put into shared memory once, chunks go out longest first.

Workers hold no state of the run, so a lost one costs only the chunk it was working on, which is done again elsewhere.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsim.config.schema import RayConfig
from fedsim.engine.assignments import Plan
from fedsim.engine.cores import available_cores
from fedsim.engine.ray import idle
from fedsim.engine.ray.cluster import connect, ours
from fedsim.engine.ray.said import Ear, Speaker
from fedsim.engine.ray.sending import Sent, adopt, check, forget_classes, send
from fedsim.engine.ray.tensors import share_tensors
from fedsim.engine.ray.transport.driver import Found, NotReady, Shared, Transport
from fedsim.engine.ray.transport.pipe import Offer
from fedsim.engine.ray.transport.receiver import Receiver
from fedsim.engine.worker import Worker
from fedsim.errors import EngineError

ATTEMPTS = 4  # times a chunk is started before its loss is given up
PATIENCE = 30  # seconds that a lost worker has to come back
GRACE = 2  # seconds that a worker has to end its call when the run is over; then its process is ended
GPU_PARTS = 10_000  # Ray counts GPUs in parts of this size
AHEAD = 2  # calls in flight per worker, so that none waits for the driver
LAST = 2  # chunks per worker at an exchange's end that wait for a free worker, so that all end together


class _Actor:
    """A worker process."""

    _receiver: Receiver | None

    def __init__(self) -> None:
        share_tensors()
        self._ear = Ear()
        self._ear.install()
        self.stop()

    def start(self, plan: Plan, offer: Offer | None, sent: Sent) -> None:
        """Build the worker, to be called by pipe if it can be: ``serve`` is to follow."""
        forget_classes()
        adopt(sent.environment)
        check(plan, sent.code, sent.modules)
        torch.set_num_threads(plan.threads)
        self._ear.begin(lambda: None)
        worker = self._ear.hear(lambda: Worker(plan))
        self._ear.serving = lambda: worker.serving

        def run(method: str, shared: list[Any], item: Any) -> Any:
            value, *standing = shared
            value = replace(value, standing=standing[0]) if standing else value
            return self._ear.call(lambda: getattr(worker, method)(value, item))

        self._receiver = Receiver(run)
        self._receiver.accept(offer)

    def stop(self) -> None:
        self._receiver, self._ear.serving = None, lambda: None

    def serve(self) -> None:
        """Make the calls that come by pipe, until it ends."""
        if self._receiver is not None:
            self._receiver.serve()

    def call(self, method: str, shared: list[tuple[int, Any]], item: Any) -> Any:
        """Make a call that comes through Ray."""
        import ray

        if self._receiver is None:
            raise NotReady
        return self._receiver.call(method, shared, item, ray.get)


class RayEngine:
    """Actors on this machine or on a cluster (``engine.address``)."""

    remote = False

    def __init__(self, config: RayConfig):
        import ray

        self._ray = ray
        self._config = config
        connect(config)
        share_tensors()
        own = ours()  # asking it what it has takes a second after its start
        resources = {"GPU": torch.cuda.device_count()} if own else ray.cluster_resources()
        cores = available_cores() if own else int(resources.get("CPU", 1))
        gpus = int(resources.get("GPU", 0)) if config.device != "cpu" else 0
        self.workers = config.workers or gpus or max(1, cores)
        # A Ray of our own is ours to fill; on somebody's cluster each worker asks for a CPU, and must get one.
        if not own and self.workers > cores:
            raise EngineError(
                f"engine.workers={self.workers}, but the cluster has {cores} CPUs; "
                "start fewer workers or join a larger one"
            )
        share = gpu_share(self.workers, gpus)
        self._options = {"num_cpus": 0 if own else 1, "num_gpus": share}
        self._actors, self._code = idle.take(0 if share else self.workers, ray.kill)
        self._actors += [self._new_actor() for _ in range(self.workers - len(self._actors))]
        self._plan: Sent | None = None
        self._transport = Transport(ray)
        self._speaker = Speaker()
        self._standing: Shared | None = None
        self._threads: int | None = None

    def start(self, plan: Plan) -> None:
        """Put the plan (data included) into shared memory once; workers map it.

        The server computes with as many torch threads as a worker: they change the bits of what strategies do too.
        """
        if self._threads is None:
            self._threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        self._plan = send(self._ray, plan)
        for actor, started in [(a, self._start(a)) for a in self._actors]:
            try:
                self._ray.get(started)
            except self._ray.exceptions.RayActorError:  # died since its last run
                self._revive(actor)
            except self._ray.exceptions.RayTaskError as e:
                raise e.cause if isinstance(e.cause, EngineError) else e.as_instanceof_cause() from None

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """Results in the order of ``items``, each as soon as it and all before it are there."""
        order = sorted(range(len(items)), key=lambda i: -costs[i]) if costs else list(range(len(items)))
        ready: dict[int, Any] = {}
        following = 0
        for index, result in self._unordered(method, self._shared(shared), items, order):
            ready[index] = result
            while following in ready:
                yield self._speaker.result(ready.pop(following))
                following += 1

    def close(self) -> None:
        """Keep the worker processes, emptied, for the next run of this process; ``cluster.shutdown`` ends them.

        One that is still at work, after an error or a timeout, may never end: it is not kept.
        """
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None
        at_work = [actor for actor in self._actors if self._transport.close(actor)]
        stopped = {actor: actor.stop.remote() for actor in self._actors}
        if at_work:
            waited = [stopped[actor] for actor in at_work]
            _, late = self._ray.wait(waited, num_returns=len(waited), timeout=GRACE)
            for actor in [actor for actor in at_work if stopped[actor] in late]:
                self._drop(actor)
        if not self._options["num_gpus"]:
            idle.keep(self._actors, self._code)
        self._actors, self._standing, self._transport = [], None, Transport(self._ray)

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
        todo, tries, busy = order[::-1], Counter[int](), dict[int, tuple[int, Any]]()
        load = Counter(dict.fromkeys(self._actors, 0))

        def send() -> None:
            while todo and min(load.values()) < (AHEAD if len(todo) > LAST * len(load) else 1):
                index, actor = todo.pop(), min(load, key=lambda a: load[a])
                tries[index] += 1
                load[actor] += 1
                busy[self._transport.send(actor, method, shared, items[index])] = index, actor

        while todo or busy:
            send()
            came = self._transport.next(self._config.timeout)
            if came is None:
                names = ", ".join(_chunk(index, items) for index, _ in busy.values())
                raise EngineError(
                    f"{names} took longer than engine.timeout={self._config.timeout} s; raise it or find the client"
                )
            if isinstance(came, Found):
                if came.call in busy:  # not of an exchange that was given up
                    index, actor = busy.pop(came.call)
                    load[actor] -= 1
                    send()  # before its answer is read, so that the worker need not wait for that
                    yield index, came.read()
                continue
            lost = [call for call, (_, actor) in busy.items() if actor is came.worker]
            for index, _ in [busy.pop(call) for call in lost]:
                if tries[index] >= ATTEMPTS:
                    raise EngineError(
                        f"{_chunk(index, items)} was lost {ATTEMPTS} times with its worker (killed, out of memory?); "
                        "use fewer engine.workers or more, smaller engine.chunks"
                    )
                todo.append(index)
            load.pop(came.worker, None)
            if (instead := self._revive(came.worker)) is not None:
                load[instead] = 0

    def _revive(self, actor: Any) -> Any | None:
        """Give a restarted actor its plan, or replace one that does not come back; with its node gone, do without.

        Returns the actor that goes on, if any.
        """
        errors, end = self._ray.exceptions, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                self._ray.get(self._start(actor), timeout=PATIENCE)
                return actor
            except errors.ActorDiedError:
                break
            except (errors.RayActorError, TimeoutError):
                time.sleep(0.1)
        self._drop(actor)
        fresh = None
        if not self._actors or time.monotonic() < end:  # there may be room for another
            fresh = self._new_actor()
            self._actors.append(fresh)
            try:
                self._ray.get(self._start(fresh), timeout=2 * PATIENCE)
            except (errors.RayActorError, TimeoutError):
                self._drop(fresh)
                fresh = None
        if not self._actors:
            raise EngineError(
                "no worker is left (nodes lost, out of memory?); the same command goes on from the last finished round"
            )
        if len(self._actors) < self.workers:
            warnings.warn(f"a worker is lost for good; {len(self._actors)} go on", stacklevel=2)
        return fresh

    def _start(self, actor: Any) -> Any:
        """Send the plan; the reference says when it has arrived."""
        assert self._plan is not None, "start(plan) comes first"
        sent = self._plan._replace(stored=None, kept=())
        started = actor.start.remote(self._plan.stored, self._transport.open(actor), sent)
        actor.serve.remote()
        return started

    def _drop(self, actor: Any) -> None:
        """End a worker for good."""
        self._actors.remove(actor)
        self._transport.close(actor)
        self._ray.kill(actor)

    def _new_actor(self) -> Any:
        return self._ray.remote(_Actor).options(**self._options, max_restarts=-1, max_task_retries=0).remote()


def gpu_share(workers: int, gpus: int) -> float:
    """What each of the ``workers`` asks of a GPU such that all find a place: a whole one, or 1/k where k share it."""
    if not gpus:
        return 0.0
    per_gpu = -(-workers // gpus)
    return math.floor(GPU_PARTS / per_gpu) / GPU_PARTS


def _chunk(index: int, items: Sequence[Any]) -> str:
    """A chunk's name in messages."""
    clients = getattr(items[index], "clients", None)
    return f"chunk {index}" + (f" (clients {list(clients)})" if clients else "")
