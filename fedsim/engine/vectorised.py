"""Many clients of a chunk at once: local rules are written over ``(..., d)``, so only the gradient is vectorised.

Agrees with the loop over clients to float rounding. Clients with longer schedules come first, so that those still
training are a prefix; where batch shapes differ within a step (last batches of an epoch), each shape is one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedsim.data.local import Batch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job

if TYPE_CHECKING:
    from fedsim.engine.worker import Broadcast, Chunk, Worker


def wanted(wish: str, device: str) -> bool:
    """Whether chunks are to be vectorised: ``auto`` does on a GPU; on a CPU it was measured to lose."""
    return wish == "on" or (wish == "auto" and device != "cpu")


def possible(worker: Worker, broadcast: Broadcast, chunk: Chunk) -> bool:
    """Whether this chunk can run vectorised: a step rule under the default ``fit``, and a model without BatchNorm
    statistics or weights of its own, or dropout (whose draws per client cannot be those of the loop)."""
    rule = getattr(worker.plan.client, broadcast.task, None)
    return (
        getattr(rule, "stepwise", False)
        and worker.model.layout.buffer_dim == 0
        and not worker.model.draws
        and not worker.part.spans
        and worker.plan.local.adam is None
        and not chunk.each
        and len(set(chunk.turns.values())) < 2
        and len(chunk.clients) > 1
    )


@dataclass
class ChunkJob(Job):
    """The job of several clients: ``state``, ``keep`` and vectors carry a leading client axis."""

    members: Sequence[Job] = ()
    gradient: Any = None

    def grad(
        self, w: Tensor, batch: Batch, *, again: bool = False, loss: Any = None, forward: Any = None
    ) -> Tensor:
        """Gradients ``(C, d)`` of the clients' mini-batches ``(C, B, ...)``."""
        if loss is not None or forward is not None:
            raise ClientError("a loss of its own per step cannot be vectorised; use engine.vectorize=off")
        for job in self.members:
            job.gradients += batch.x.shape[1]
        g, values = self.gradient(w, batch.x, batch.y)
        if not again:
            for job, value in zip(self.members, values.unbind(), strict=True):
                job.losses.append(value)
        return g  # type: ignore[no-any-return]

    def group(self, rows: list[int]) -> ChunkJob:
        """The same job for some of its clients."""
        if len(rows) == len(self.members):
            return self
        index = torch.tensor(rows)
        part = replace(self, members=[self.members[i] for i in rows])
        part.state = {k: v[index] for k, v in self.state.items()}
        part.keep = {k: v[index] if v.dim() > 1 else v for k, v in self.keep.items()}
        part.own_anchor = None if self.own_anchor is None else self.own_anchor[index]
        part.momentum = None if self.momentum is None else self.momentum[index]
        part.clipped = self.clipped[index] if isinstance(self.clipped, Tensor) else self.clipped
        return part


@dataclass
class _Schedule:
    """Batches of all members, read ahead by one so that finished clients are known."""

    members: Sequence[Job]
    feeds: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.feeds = [job.batches() for job in self.members]

    def step(self) -> dict[tuple[Any, ...], list[tuple[int, Batch]]]:
        """The next batch of every client that has one, by shape."""
        groups: dict[tuple[Any, ...], list[tuple[int, Batch]]] = {}
        for i, feed in enumerate(self.feeds):
            batch = next(feed, None)
            if batch is not None:
                groups.setdefault((tuple(batch.x.shape), tuple(batch.y.shape)), []).append((i, batch))
        return groups


def train(worker: Worker, broadcast: Broadcast, chunk: Chunk) -> dict[int, tuple[Job, Update]]:
    """Updates of the chunk's clients that have steps to do, with the job each belongs to."""
    jobs = [worker.job(broadcast, chunk, c) for c in chunk.clients]
    for job in jobs:
        worker.plan.client.prepare(job)
    jobs = sorted((j for j in jobs if j.num_steps), key=lambda j: -j.num_steps)
    if len(jobs) < 2 or len({tuple(sorted(j.state)) for j in jobs}) > 1:
        return {}
    client, first = worker.plan.client, jobs[0]
    state = {k: torch.stack([j.state[k] for j in jobs]) for k in first.state}
    shared = {k: v for k, v in vars(first).items() if k in Job.__dataclass_fields__}
    whole = ChunkJob(**{**shared, "state": state, "keep": {}, "losses": []}, members=jobs)
    whole.gradient = _gradient(worker)
    if chunk.rows:
        whole.own_anchor = torch.stack([j.anchor for j in jobs])
    w = client.begin(whole, torch.stack([j.anchor for j in jobs]))
    schedule = _Schedule(jobs)
    while groups := schedule.step():
        for members in groups.values():
            rows = [i for i, _ in members]
            batch = Batch(torch.stack([b.x for _, b in members]), torch.stack([b.y for _, b in members]))
            job = whole.group(rows)
            if job is whole:
                w = client.step(job, w, batch)
            else:
                index = torch.tensor(rows)
                w[index] = client.step(job, w[index], batch)
                _put_back(whole, job, index)
    return {job.client: (job, _finish(client, whole, i, w[i])) for i, job in enumerate(jobs)}


def _finish(client: Any, whole: ChunkJob, i: int, w: Tensor) -> Update:
    job = whole.members[i]
    job.keep = {k: v[i] if v.dim() > 1 else v for k, v in whole.keep.items()}
    job.momentum = None if whole.momentum is None else whole.momentum[i]
    job.clipped = int(whole.clipped[i]) if isinstance(whole.clipped, Tensor) else whole.clipped
    update: Update = client.finish(job, w)
    return update


def _put_back(whole: ChunkJob, part: ChunkJob, index: Tensor) -> None:
    if part.momentum is not None:
        if whole.momentum is None:
            whole.momentum = part.momentum.new_zeros((len(whole.members), part.momentum.shape[-1]))
        whole.momentum[index] = part.momentum
    if isinstance(part.clipped, Tensor):
        if not isinstance(whole.clipped, Tensor):
            whole.clipped = part.clipped.new_zeros((len(whole.members), 1))
        whole.clipped[index] = part.clipped


def _gradient(worker: Worker) -> Any:
    """``(w (C, d), x (C, B, ...), y (C, B, ...)) -> gradients (C, d), losses (C,)``."""
    module, layout, loss = worker.model.module, worker.model.layout, worker.plan.task.loss

    def value(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        params: Mapping[str, Tensor] = {s.name: w[s.span].view(s.shape) for s in layout.params}
        return loss(functional_call(module, dict(params), (x,)), y)

    return vmap(grad_and_value(value))
