"""FLoRA's local rule where clients have ranks of their own (Wang et al. 2024): the first ranks are trained and sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from clients.exact import ExactClient
from clients.sgd import SGDClient
from fedsim.exchange.payload import Payload, Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class FLoRAClient(ExactClient):
    """Client k trains the first ``ranks[k mod n]`` rows of A and columns of B; the others are zero, so that they have
    no gradient, and are not sent: ``factors`` are the changes of everything else, end to end."""

    grad_only = True
    ranks: tuple[int, ...]
    caches: ClassVar[frozenset[str]] = ExactClient.caches | {"places"}
    places: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def setup(self, task: Task, layout: Layout) -> None:
        """Where the numbers of each rank lie."""
        super().setup(task, layout)
        adapters = self.found["adapters"]
        self.places.clear()
        self.places.update({r: kept_places(adapters, layout, r) for r in set(self.ranks)})

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Without the ranks that this client has not."""
        own = torch.zeros(len(w), dtype=torch.bool, device=w.device)
        own[self._own(job)] = True
        return w.masked_fill_(~own, 0)

    def finish(self, job: Job, w: Tensor) -> Update:
        """What it trained."""
        update = super().finish(job, w)
        return replace(update, arrays={"factors": update.arrays["delta"][self._own(job)]})

    def _own(self, job: Job) -> Tensor:
        return self.places[rank_of(self.ranks, job.client)]


@dataclass(frozen=True, kw_only=True)
class RankedClient(SGDClient):
    """Client k receives, trains and sends the first ``ranks[k mod n]`` ranks and everything beside the adapters, as
    ``factors`` end to end; the other ranks are zero."""

    grad_only = True
    ranks: tuple[int, ...]
    caches: ClassVar[frozenset[str]] = frozenset({"places"})
    places: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def setup(self, task: Task, layout: Layout) -> None:
        """Where the numbers of each rank lie."""
        adapters = adapters_of(task.model, layout)
        self.places.clear()
        self.places.update({r: kept_places(adapters, layout, r) for r in set(self.ranks)})

    def prepare(self, job: Job) -> None:
        """Put the model together from what was received."""
        given = dict(job.message.arrays)
        if "factors" in given:
            w = torch.zeros_like(job.model.w)
            w[self._own(job)] = given.pop("factors")
            job.message = Payload({"w": w, **given}, job.message.values)

    def finish(self, job: Job, w: Tensor) -> Update:
        """What it trained."""
        update = super().finish(job, w)
        return replace(update, arrays={"factors": update.arrays["delta"][self._own(job)]})

    def _own(self, job: Job) -> Tensor:
        return self.places[rank_of(self.ranks, job.client)]


def rank_of(ranks: Sequence[int], client: int) -> int:
    """The rank of a client."""
    return ranks[client % len(ranks)]


def kept_places(adapters: Sequence[Adapter], layout: Layout, rank: int) -> Tensor:
    """Places in ``w`` (d,), ascending, of all parameters, of adapters the first ``rank`` ranks alone."""
    kept = layout.expand(torch.ones(layout.size, dtype=torch.bool))
    for ad in adapters:
        a, b = ad.factors(kept)
        a[rank:] = False
        b[:, rank:] = False
    return torch.nonzero(kept).flatten()
