"""Ray's workers: resident actors on this machine or on a cluster.

They hold no state of the run, so a lost one costs only the chunk it was working on, which is done again elsewhere.
"""

from __future__ import annotations

import math
import time
import warnings
from contextlib import nullcontext
from typing import Any

import torch

from fedsim.config.schema import RayConfig
from fedsim.engine.assignments import Plan
from fedsim.engine.cores import available_cores
from fedsim.engine.ray import idle
from fedsim.engine.ray.cluster import connect, ours
from fedsim.engine.ray.hosting import Host, Switches
from fedsim.engine.ray.inplace import InPlace
from fedsim.engine.ray.sending import Sent, adopt, check, forget_classes, send
from fedsim.engine.ray.tensors import light, share_tensors
from fedsim.engine.ray.transport.driver import NotReady, Transport
from fedsim.engine.ray.transport.pipe import Offer
from fedsim.engine.ray.transport.receiver import Receiver
from fedsim.errors import EngineError

PATIENCE = 30  # seconds that a lost worker has to come back
GRACE = 2  # seconds that a worker has to end its call when the run is over; then its process is ended
GPU_PARTS = 10_000  # Ray counts GPUs in parts of this size


class _Actor:
    """A worker process."""

    _receiver: Receiver | None = None

    def __init__(self) -> None:
        with light():
            share_tensors()
        self._host = Host()

    def start(self, plan: Plan, offer: Offer | None, sent: Sent, switches: Switches) -> None:
        """Build the worker, to be called by pipe if it can be: ``serve`` is to follow."""
        forget_classes()
        adopt(sent.environment)
        check(plan, sent.code, sent.modules)
        switches.set()
        self._host.begin(plan)
        self._receiver = Receiver(self._host.run)
        self._receiver.accept(offer)

    def stop(self) -> None:
        self._receiver = None
        self._host.end()

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


class Actors:
    """Ray's workers of a run, once Ray is up; ``transport`` reaches them."""

    def __init__(self, config: RayConfig, moved: InPlace) -> None:
        """Waits for Ray. ``moved``: what of the samples lies in memory that workers map."""
        connect(config)
        import ray

        self._ray, self._moved = ray, moved
        own = ours()  # asking it what it has takes a second after its start
        with light() if own else nullcontext():
            share_tensors()
        resources = {"GPU": torch.cuda.device_count()} if own else ray.cluster_resources()
        cores = available_cores() if own else int(resources.get("CPU", 1))
        gpus = int(resources.get("GPU", 0)) if config.device != "cpu" else 0
        self.number = config.workers or gpus or max(1, cores)
        # A Ray of our own is ours to fill; on somebody's cluster each worker asks for a CPU, and must get one.
        if not own and self.number > cores:
            raise EngineError(
                f"engine.workers={self.number}, but the cluster has {cores} CPUs; "
                "start fewer workers or join a larger one"
            )
        share = gpu_share(self.number, gpus)
        self._options = {"num_cpus": 0 if own else 1, "num_gpus": share}
        self.workers, self._code = idle.take(0 if share else self.number, ray.kill)
        self.workers += [self._new() for _ in range(self.number - len(self.workers))]
        self.transport = Transport(ray)
        self._plan: Sent | None = None
        self._switches = Switches.here()
        self._starting: list[tuple[Any, Any]] = []  # workers that have been sent their plan, and what says so

    def send(self, plan: Plan) -> None:
        """Put the plan (data included) into shared memory once; workers map it. They are ``ready`` later."""
        self._plan, self._switches = send(self._ray, plan, self._moved), Switches.here()
        self._starting = [(worker, self._start(worker)) for worker in self.workers]

    @property
    def ready(self) -> bool:
        """Whether all have built their worker, or failed to."""
        waited = [started for _, started in self._starting]
        return len(self._ray.wait(waited, num_returns=len(waited), timeout=0)[0]) == len(waited)

    def settle(self) -> None:
        """Wait until all are ready. Raises what a worker raises that cannot be built."""
        starting, self._starting = self._starting, []
        for worker, started in starting:
            try:
                self._ray.get(started)
            except self._ray.exceptions.RayActorError:  # died since its last run
                self.revive(worker)
            except self._ray.exceptions.RayTaskError as e:
                raise e.cause if isinstance(e.cause, EngineError) else e.as_instanceof_cause() from None

    def revive(self, worker: Any) -> Any | None:
        """Give a restarted worker its plan, or replace one that does not come back; with its node gone, do without.

        Returns the worker that goes on, if any.
        """
        errors, end = self._ray.exceptions, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                self._ray.get(self._start(worker), timeout=PATIENCE)
                return worker
            except errors.ActorDiedError:
                break
            except (errors.RayActorError, TimeoutError):
                time.sleep(0.1)
        self._drop(worker)
        fresh = None
        if not self.workers or time.monotonic() < end:  # there may be room for another
            fresh = self._new()
            self.workers.append(fresh)
            try:
                self._ray.get(self._start(fresh), timeout=2 * PATIENCE)
            except (errors.RayActorError, TimeoutError):
                self._drop(fresh)
                fresh = None
        if not self.workers:
            raise EngineError(
                "no worker is left (nodes lost, out of memory?); the same command goes on from the last finished round"
            )
        if len(self.workers) < self.number:
            warnings.warn(f"a worker is lost for good; {len(self.workers)} go on", stacklevel=2)
        return fresh

    def close(self) -> None:
        """Keep the processes, emptied, for the next run of this process; ``cluster.shutdown`` ends them.

        One that is still at work, after an error or a timeout, may never end: it is not kept.
        """
        at_work = [worker for worker in self.workers if self.transport.close(worker)]
        stopped = {worker: worker.stop.remote() for worker in self.workers}
        if at_work:
            waited = [stopped[worker] for worker in at_work]
            _, late = self._ray.wait(waited, num_returns=len(waited), timeout=GRACE)
            for worker in [worker for worker in at_work if stopped[worker] in late]:
                self._drop(worker)
        if not self._options["num_gpus"]:
            idle.keep(self.workers, self._code)
        self.workers, self.transport = [], Transport(self._ray)

    def _start(self, worker: Any) -> Any:
        """Send the plan; the reference says when it has arrived."""
        assert self._plan is not None, "send(plan) comes first"
        sent = self._plan._replace(stored=None, kept=())
        started = worker.start.remote(self._plan.stored, self.transport.open(worker), sent, self._switches)
        worker.serve.remote()
        return started

    def _drop(self, worker: Any) -> None:
        """End a worker for good."""
        self.workers.remove(worker)
        self.transport.close(worker)
        self._ray.kill(worker)

    def _new(self) -> Any:
        return self._ray.remote(_Actor).options(**self._options, max_restarts=-1, max_task_retries=0).remote()


def gpu_share(workers: int, gpus: int) -> float:
    """What each of the ``workers`` asks of a GPU such that all find a place: a whole one, or 1/k where k share it."""
    if not gpus:
        return 0.0
    per_gpu = -(-workers // gpus)
    return math.floor(GPU_PARTS / per_gpu) / GPU_PARTS
