"""Local SGD of parts of a model: some stay with their client, and rounds may train another part in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.lowrank import NO_ADAPTERS, outside_adapters


@dataclass(frozen=True, kw_only=True)
class PartClient(SGDClient):
    """Trains everything; parameters that fit a pattern of ``local`` are kept, and never sent (``keeps``)."""

    local: tuple[str, ...] = ()

    def keeps(self, layout: Layout) -> frozenset[str]:
        """The parameters that stay."""
        return frozenset(fitting(layout, self.local))


@dataclass(frozen=True, kw_only=True)
class SharedStartClient(PartClient):
    """The same, but what it keeps is also sent, as ``own`` (k,), so that others may begin with the mean of it: whoever
    receives ``newcomer`` (k,) begins with that."""

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """A newcomer's kept part is that of the others."""
        if "newcomer" in job.message.arrays:
            w[entries(job.layout, self.local)] = job.message.arrays["newcomer"]
        return w

    def finish(self, job: Job, w: Tensor) -> Update:
        """What is kept too, as it is."""
        own = w[entries(job.layout, self.local)]
        update = super().finish(job, w)
        return replace(update, arrays={**update.arrays, "own": own})


@dataclass(frozen=True, kw_only=True)
class TurnClient(PartClient):
    """In round t (of the server, from 0) the parameters of ``turns[t mod n]`` are trained, and those of no turn.

    The others have no gradient in effect: they neither move nor decay, and their part of the update is zero.
    """

    grad_only = True
    turns: tuple[tuple[str, ...], ...] = ()

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step that passes the other turns' parameters by."""
        g = job.grad(w, batch)
        idle = job.layout.spans(
            {s.name for s in job.layout.params if _within(s.span, job.sgd.idle)} | self.rest(job)
        )
        job.sgd.idle = tuple(idle)
        return job.sgd(w, g)

    def rest(self, job: Job) -> set[str]:
        """Names of the parameters that other rounds train."""
        return waiting(job.layout, self.turns, job.round)


def fitting(layout: Layout, patterns: tuple[str, ...]) -> set[str]:
    """Names of the parameters that fit one of the patterns, or with ``NO_ADAPTERS`` among these are no adapter's."""
    names = [s.name for s in layout.params]
    found = {n for n in names if any(fnmatchcase(n, p) for p in patterns)}
    return found | set(outside_adapters(names)) if NO_ADAPTERS in patterns else found


def entries(layout: Layout, patterns: tuple[str, ...]) -> Tensor:
    """Places (k,) in ``w``, ascending, of the parameters that fit one of the patterns."""
    names, real = fitting(layout, patterns), layout.expand(torch.ones(layout.size, dtype=torch.bool))
    return torch.cat(
        [s.span.start + torch.nonzero(real[s.span]).flatten() for s in layout.params if s.name in names]
    )


def waiting(layout: Layout, turns: tuple[tuple[str, ...], ...], round: int) -> set[str]:
    """Names of the parameters of other turns than that of ``round``."""
    mine = fitting(layout, turns[round % len(turns)])
    return {name for turn in turns for name in fitting(layout, turn)} - mine


def _within(span: slice, spans: tuple[slice, ...]) -> bool:
    return any(s.start <= span.start and span.stop <= s.stop for s in spans)
