"""Several clients at once on one GPU: each lane has a resident model and a stream of its own.

A client's steps are only launched when it is begun; while the GPU computes them, the next lane's client is begun. What
a client computes does not depend on its lane, and updates are folded in client order: the same bits whatever the
number of lanes. On a CPU lanes are worked off one after the other, by the same code.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedsim.engine import vectorised
from fedsim.engine.assignments import Broadcast, Chunk, Plan
from fedsim.engine.resident import Resident
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.captured import CapturedModel
from fedsim.task.losses import stateless
from fedsim.task.vectors import FlatModel

LANES, SHARE = 8, 0.25  # by default; of the GPU's free memory that models of lanes may take
VECTORS = 8  # of a model's size that a lane needs beside its activations: weights, gradients, graph


def number(plan: Plan, model: FlatModel) -> int:
    """Lanes of a worker: ``engine.lanes``, by default 8 on a GPU that has room for them. 1 is the plain loop, as it is
    with a loss that may keep something from batch to batch."""
    if plan.lanes == 1 or (plan.device == "cpu" and not plan.lanes) or not stateless(plan.task.loss):
        return 1
    if plan.lanes:
        return plan.lanes
    size = VECTORS * model.w.numel() * model.w.element_size()
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(LANES, int(SHARE * free / max(1, size))))


class Lane:
    """A resident of its own, and on a GPU a stream and a state of the generator that masks are drawn from."""

    def __init__(self, plan: Plan, main: Resident):
        # what the client's setup builds is used by one lane only
        plan = replace(plan, client=copy.deepcopy(plan.client))
        self._cuda = plan.device != "cpu"
        self._main: Any = None
        if self._cuda:
            self._main, self._generator = torch.cuda.current_stream(), _generator()
            self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._draws = self._generator.clone_state()
        with self.entered():
            self.resident = Resident(plan, main.data)
            model = self.resident.model
            if isinstance(model, CapturedModel) and vectorised.unusual(plan, model) is None:
                model.capture(plan.task.loss)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched within goes to the lane's stream, after all that was launched before."""
        if not self._cuda:
            yield
            return
        generator = self._generator
        before = generator.graphsafe_get_state()
        self.stream.wait_stream(self._main)
        generator.graphsafe_set_state(self._draws)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            generator.graphsafe_set_state(before)

    def join(self) -> None:
        """What is launched from now on comes after what this lane has launched."""
        if self._cuda:
            self._main.wait_stream(self.stream)


@dataclass
class Begun:
    """A client whose work was begun on a lane: its job, and what its code returned or raised."""

    lane: Lane
    job: Job
    task: str
    spent: float = 0.0  # seconds so far
    found: Any = None
    error: BaseException | None = None

    @property
    def update(self) -> Update:
        """Its answer. Raises what its code raised."""
        if self.error is not None:
            raise self.error
        return self.lane.resident.checked(self.job, self.found, self.task)


class Ahead:
    """The clients of a chunk on lanes: each is begun once a lane is free, and handed over in client order."""

    def __init__(self, lanes: Sequence[Lane], main: Resident, broadcast: Broadcast, chunk: Chunk):
        self._broadcast, self._chunk, self._todo = broadcast, chunk, deque(chunk.clients)
        self._begun: dict[int, Begun] = {}
        self._last: Lane | None = None
        for lane in lanes:
            lane.resident.data = main.data
            self._begin(lane)

    def get(self, client: int) -> Begun:
        """The answer of the chunk's next client. What it left in its lane is overwritten after the next call."""
        if self._last is not None:
            self._begin(self._last)
        begun = self._begun.pop(client)
        self._last = begun.lane
        begun.lane.join()
        return begun

    def _begin(self, lane: Lane) -> None:
        if not self._todo:
            return
        client, start = self._todo.popleft(), time.perf_counter()
        with lane.entered():
            job = lane.resident.job(self._broadcast, self._chunk, client)
            begun = self._begun[client] = Begun(lane, job, self._broadcast.task)
            try:
                begun.found = lane.resident.begin(job, begun.task)
            except (Exception, SystemExit) as e:
                begun.error = e
        begun.spent = time.perf_counter() - start


def _generator() -> Any:
    return torch.cuda.default_generators[torch.cuda.current_device()]
