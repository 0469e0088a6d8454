"""Many clients of a chunk at once: local rules are written over ``(..., d)``, so only the gradient is vectorised.

Agrees with the loop over clients to float rounding. Clients with longer schedules come first, so that those still
training are a prefix; where batch shapes differ within a step (last batches of an epoch), each shape is one group.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedsim.data.local import Batch
from fedsim.data.trees import Tree, join, leaves, shapes
from fedsim.engine.assignments import Broadcast, Chunk, Plan
from fedsim.engine.resident import ReadOnly, Resident
from fedsim.errors import ClientError
from fedsim.exchange.payload import Payload, Update
from fedsim.local.interface import Stepwise
from fedsim.local.job import Job
from fedsim.local.kept import LocalPart
from fedsim.task.captured import Captured
from fedsim.task.losses import WholeLoss, call, stateless
from fedsim.task.vectors import FlatModel

Gradient = Callable[[Tensor, Tree, Tree], tuple[Tensor, Tensor]]


class Trained(NamedTuple):
    """A client's job and its update."""

    job: Job
    update: Update


SMALL = 1_000_000  # numbers of a model up to which it is vectorised by default on a GPU


def wanted(plan: Plan, model: FlatModel) -> bool:
    """Whether chunks are to be vectorised. ``auto`` does so with a small model on a GPU, which has more to do then;
    large ones are faster on lanes (benchmarks/README.md). On a CPU it was measured to lose."""
    if plan.vectorize != "auto" or plan.device == "cpu":
        return plan.vectorize == "on"
    return model.layout.size <= SMALL


def obstacle(plan: Plan, model: FlatModel) -> str | None:
    """Why the clients of a run cannot be vectorised, or ``None``: a rule not declared so, weights or statistics of a
    client's own, averaged statistics, dropout (whose draws per client cannot be those of the loop), Adam, accumulation,
    a model that does more than compute."""
    name, layout = type(plan.client).__name__, model.layout
    if plan.release is not None and (p := plan.release.privacy) is not None and p.level == "record":
        return "privacy=record computes a gradient for every sample"
    if not plan.declared:
        return (
            f"{name} does not declare that its begin and step are written over (..., d) for many clients "
            "(`vectorisable = True` on the class)"
        )
    if LocalPart.of(plan.buffers, layout, plan.client.keeps(layout)).spans:
        return f"clients keep weights of their own ({name}, buffers={plan.buffers})"
    if layout.buffer_dim:
        return "the model has buffers (running statistics), which every client updates by itself"
    if type(plan.task.loss) is WholeLoss or plan.task.forward is not None:
        return "the loss calls the model by itself"
    if not plan.data.dataset.train.sliceable:
        return "batches are put together one by one"
    if (why := unusual(plan, model)) is not None:
        return why
    if model.draws:
        return "the model has dropout, drawn for each client by itself"
    if plan.local.accumulate > 1 or (plan.kinds and any(c.accumulate > 1 for c in plan.kinds.settings)):
        return "client.accumulate adds up the micro-batches of each client by itself"
    return "client.adam keeps moments of each client by itself" if plan.local.adam is not None else None


def unusual(plan: Plan, model: FlatModel) -> str | None:
    """What in the model many clients at once cannot have, each for itself, nor a captured step repeat."""
    habits = plan.task.habits
    if model.iterates:
        return "spectral norm iterates for every client by itself"
    for names, why in (
        (habits.writes, "the model writes to its parameter '{}' when it computes"),
        (habits.remembers, "the model remembers '{}' from batch to batch"),
        (habits.unused, "'{}' has no part in the loss and must not decay"),
    ):
        if names:
            return why.format(names[0])
    return None


def planned(plan: Plan, model: FlatModel) -> bool:
    """Whether this run vectorises; warns where ``engine.vectorize=on`` asks for what cannot be."""
    if not wanted(plan, model):
        return False
    why = obstacle(plan, model)
    if why is not None and plan.vectorize == "on":
        warnings.warn(
            f"engine.vectorize=on: {type(plan.client).__name__} clients run one by one, since {why}; "
            "engine.vectorize=off computes the same without this warning",
            stacklevel=2,
        )
    return why is None


def possible(broadcast: Broadcast, chunk: Chunk) -> bool:
    """Whether this chunk can: local training of several clients, which differ in rows of the message at most."""
    turns = {chunk.turns.get(c, broadcast.round) for c in chunk.clients}
    return broadcast.task == "fit" and not chunk.each and len(turns) < 2 and len(chunk.clients) > 1


class ChunkJob:
    """What ``begin`` and ``step`` see of the jobs of several clients: the part of ``Job`` that holds for all of them.

    ``state``, ``keep``, vectors and what each client receives by itself carry a leading client axis. What belongs to
    one client (``client``, ``data``, ``rng``, ...) is not here: the chunk that asks for it runs one by one.
    """

    def __init__(self, members: Sequence[Job], gradient: Gradient, rows: Iterable[str]):
        first = members[0]
        self.members, self._gradient, self._rows = members, gradient, tuple(rows)
        self.task, self.local, self.round, self.seed = first.task, first.local, first.round, first.seed
        self.values, self.layout, self.lr = first.values, first.layout, first.lr
        own = {k: torch.stack([job.message.arrays[k] for job in members]) for k in self._rows}
        self.message = Payload({**first.message.arrays, **own}, first.values)
        self.sgd = first.sgd.of_many([job.sgd for job in members])
        self.state = {k: torch.stack([job.state[k] for job in members]) for k in first.state}
        self.keep: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"job.{name} belongs to one client, or is nothing that a job has; several clients are computed at once "
            "here: take it out of begin and step, or set vectorisable = False on the client's class"
        )

    @property
    def anchor(self) -> Tensor:
        """The received vector (d,), or (C, d) where each client receives its own; read-only."""
        return self.message.arrays["w"]

    @property
    def steps(self) -> int:
        """Mini-batch steps done so far, the same for all that still train."""
        return self.members[0].steps

    def grad(
        self, w: Tensor, batch: Batch, *, again: bool = False, loss: Any = None, forward: Any = None
    ) -> Tensor:
        """Gradients ``(C, d)`` of the clients' mini-batches ``(C, B, ...)``."""
        if loss is not None or forward is not None:
            raise ClientError("a loss of its own per step cannot be vectorised; use engine.vectorize=off")
        for job in self.members:
            job.meter.backward(leaves(batch.x)[0].shape[1])
        g, values = self._gradient(w, batch.x, batch.y)
        if not again:
            for job, value in zip(self.members, values.unbind(), strict=True):
                job.meter.losses.append(value)
        return g

    def descend(self, w: Tensor, batch: Batch, *, loss: Any = None, forward: Any = None) -> Tensor:
        """One plain local step of every client."""
        return self.sgd(w, self.grad(w, batch, loss=loss, forward=forward))

    def group(self, rows: list[int], index: Tensor) -> ChunkJob:
        """The same job for some of its clients."""
        part = copy.copy(self)
        part.members = [self.members[i] for i in rows]
        part.sgd = self.sgd.rows(index)
        part.state = {k: v[index] for k, v in self.state.items()}
        part.keep = {k: v[index] if v.dim() > 1 else v for k, v in self.keep.items()}
        own = {k: self.message.arrays[k][index] for k in self._rows}
        part.message = Payload({**self.message.arrays, **own}, self.values)
        return part

    def member(self, i: int) -> Job:
        """The job of one client after the last step."""
        job, sgd = self.members[i], self.sgd
        job.keep = {k: v[i] if v.dim() > 1 else v for k, v in self.keep.items()}
        job.sgd.momentum = None if sgd.momentum is None else sgd.momentum[i]
        job.sgd.clipped = int(sgd.clipped[i]) if isinstance(sgd.clipped, Tensor) else sgd.clipped
        return job


def train(resident: Resident, broadcast: Broadcast, chunk: Chunk) -> dict[int, Trained]:
    """Updates of the chunk's clients that have steps to do, with the job each belongs to."""
    client = cast(Stepwise, resident.client)
    jobs = [resident.job(broadcast, chunk, c) for c in chunk.clients]
    resident.seed("fit/layers", jobs[0].round, jobs[0].client)
    with ReadOnly(jobs, resident.watch):
        for job in jobs:
            client.prepare(job)
        jobs = sorted((j for j in jobs if j.num_steps), key=lambda j: -j.num_steps)
        if len(jobs) < 2 or len({tuple(sorted(j.state)) for j in jobs}) > 1:
            return {}
        if resident.of_many is None:
            resident.of_many = _gradient(resident)
        whole = ChunkJob(jobs, resident.of_many, chunk.rows)
        w = _walk(client, whole)
        _read_losses(jobs)
        done = {}
        for i, job in enumerate(jobs):
            update = resident.checked(job, client.finish(whole.member(i), w[i]), "finish")
            done[job.client] = Trained(job, update)
        resident.model.forget()
        return done


def _read_losses(jobs: Sequence[Job]) -> None:
    """Put the losses of all jobs into main memory, at once: reading one waits for the GPU."""
    losses = [loss for job in jobs for loss in job.meter.losses]
    if not losses or losses[0].is_cpu:
        return
    there, start = torch.stack(losses).cpu().unbind(), 0
    for job in jobs:
        stop = start + len(job.meter.losses)
        job.meter.losses, start = list(there[start:stop]), stop


def _walk(client: Stepwise, whole: ChunkJob) -> Tensor:
    """All steps of all clients: their final weights (C, d)."""
    w = client.begin(cast(Job, whole), torch.stack([j.anchor for j in whole.members]))
    for groups in _steps(whole.members):
        for group in groups:
            rows = [i for i, _ in group]
            batch = Batch(*(join(torch.stack, half) for half in zip(*(b for _, b in group), strict=True)))
            if len(rows) == len(whole.members):
                w = client.step(cast(Job, whole), w, batch)
            else:
                index = torch.tensor(rows)
                part = whole.group(rows, index)
                w[index] = client.step(cast(Job, part), w[index], batch)
                whole.sgd.put_back(index, part.sgd, len(whole.members))
    return w


def _steps(members: Sequence[Job]) -> Iterator[list[list[tuple[int, Batch]]]]:
    """The next batch of every client that has one, in groups of one shape, until none has."""
    feeds = [job.batches() for job in members]
    while True:
        groups: dict[tuple[Any, ...], list[tuple[int, Batch]]] = {}
        for i, feed in enumerate(feeds):
            batch = next(feed, None)
            if batch is not None:
                groups.setdefault((shapes(batch.x), shapes(batch.y)), []).append((i, batch))
        if not groups:
            return
        yield list(groups.values())


def _gradient(resident: Resident) -> Gradient:
    """``(w (C, d), x (C, B, ...), y (C, B, ...)) -> gradients (C, d), losses (C,)``."""
    model, task, device = resident.model, resident.plan.task, resident.model.w.device.type
    scale = model.backward.scale

    def value(w: Tensor, x: Tree, y: Tree = None) -> Tensor:
        params: Mapping[str, Tensor] = {s.name: w[s.span].view(s.shape) for s in model.layout.params}

        def module(*args: Any, **named: Any) -> Any:
            return functional_call(model.module, dict(params), args, named)

        with torch.autocast(device, model.autocast, enabled=model.autocast is not None):
            found = task.loss(call(module, x, model.module), y)
        return found if scale == 1 else found * scale

    scaled = vmap(grad_and_value(value))

    def gradient(*args: Tree) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = scaled(*args)
        return found if scale == 1 else (found[0] / scale, found[1] / scale)

    if device == "cpu" or not stateless(task.loss):
        return lambda w, x, y: gradient(w, x) if y is None else gradient(w, x, y)
    captured = Captured(gradient)

    def replayed(w: Tensor, x: Tree, y: Tree) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            g, values = captured(w, x, y)
            return g.clone(), values.clone()
        return gradient(w, x) if y is None else gradient(w, x, y)

    return replayed
