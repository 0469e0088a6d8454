"""Local halves of methods that average the products B A of adapters: what they make of the base that all share, and a
node's copy of what has been added to it.

In a simulation the model is at hand. A node keeps the change of the base from the last round in which it took part, is
sent the factors of the rounds since, and works out what they came to, as the server did: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.exchange.payload import Payload, Update
from fedsim.local.job import Job
from fedsim.rng import torch_rng
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of, cross_term, exact_mean
from fedsim.task.task import Task

BASE, FACTORS, DRAWN = (
    "base",
    "factors_missed",
    "drawn",
)  # of messages to nodes; ``BASE`` also of what one keeps
KEEPS = "keeps_base"  # of the message as a node completes it: whether it had the copy that it should have
Adapters = Sequence[Adapter]


def residuals(adapters: Adapters, rows: Tensor, q: Tensor) -> list[Tensor]:
    """FedEx: ``s (sum p_i B_i A_i - B A)`` (out, in) of each adapter, float64, from single changes ``rows`` (M, d) and
    weights q (M,); what q lacks of 1 falls to the factors from before."""
    whole = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    p = torch.cat([q, (1 - q.sum()).clamp(min=0)[None]])
    out = []
    for ad in adapters:
        a, b, weights = wide(*ad.factors(whole), p)
        out.append(ad.scale * cross_term(a, b, weights / weights.sum()))
    return out


def products(adapters: Adapters, rows: Tensor, q: Tensor) -> list[Tensor]:
    """FLoRA: ``sum q_i s B_i A_i`` (out, in) of each adapter, float64, of clients' own models ``rows`` (M, d)."""
    out = []
    for ad in adapters:
        a, b, weights = wide(*ad.factors(rows), q)
        out.append(ad.scale * exact_mean(a, b, weights))
    return out


def moved(buffers: Tensor, adapters: Adapters, changes: Sequence[Tensor]) -> Tensor:
    """``buffers`` (b,), a copy, with ``changes`` (out, in) added to those of the adapters' bases."""
    out = buffers.clone()
    for ad, change in zip(adapters, changes, strict=True):
        ad.change_of(out).add_(change.to(out.dtype))
    return out


def wide(*tensors: Tensor) -> list[Any]:
    """In float64, in which products are added up."""
    return [t.double() for t in tensors]


def fresh(w: Tensor, adapters: Adapters, seed: int, round: int) -> None:
    """Draw A of all adapters anew in ``w`` (d,), in place, uniform on +-1/sqrt(in), and set B to zero."""
    rng = torch_rng(seed, "lora", round)
    for ad in adapters:
        a, b = ad.factors(w)
        bound = ad.a.shape[1] ** -0.5
        a.copy_((2 * torch.rand(ad.a.shape, generator=rng, dtype=torch.float32) - 1) * bound)
        b.zero_()


# -- rounds as they travel ----------------------------------------------------------------------------------------


def places(adapters: Adapters, dim: int, rank: int | None = None) -> Tensor:
    """Places in ``w`` (d,), ascending, of the adapters' first ``rank`` ranks, by default of all."""
    mask = torch.zeros(dim, dtype=torch.bool)
    for ad in adapters:
        a, b = ad.factors(mask)
        a[:rank] = True
        b[:, :rank] = True
    return torch.nonzero(mask).flatten()


def entry(adapters: Adapters, rows: Tensor, q: Tensor, ranks: Sequence[int]) -> Tensor:
    """A round as one vector: how many clients M, their ranks, weights ``q`` (M,), and of each of ``rows`` (M, d) the
    factors of as many ranks."""
    kept = {r: places(adapters, rows.shape[1], r) for r in set(ranks)}
    head = rows.new_tensor([len(rows), *ranks])
    return torch.cat([head, q.to(rows.dtype), *(row[kept[r]] for row, r in zip(rows, ranks, strict=True))])


def entries(adapters: Adapters, flat: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The inverse of ``entry`` for rounds end to end: rows (M, d), zero beside what was sent, and weights (M,)."""
    at, kept = 0, dict[int, Tensor]()
    while at < len(flat):
        m = int(flat[at])
        ranks, q = flat[at + 1 : at + 1 + m].tolist(), flat[at + 1 + m : at + 1 + 2 * m]
        rows, at = flat.new_zeros(m, dim), at + 1 + 2 * m
        for row, rank in zip(rows, map(int, ranks), strict=True):
            if rank not in kept:
                kept[rank] = places(adapters, dim, rank)
            row[kept[rank]] = flat[at : at + len(kept[rank])]
            at += len(kept[rank])
        yield rows, q


@dataclass(frozen=True, kw_only=True)
class ExactClient(SGDClient):
    """Local SGD of both factors, which at a node brings its copy of the base up to date first.

    ``exact``: what a round adds to the base, ``residual`` (FedEx) or ``product`` (FLoRA). One that should have a copy
    and has none says so: a change of zero that weighs nothing.
    """

    grad_only = True
    caches: ClassVar[frozenset[str]] = frozenset({"found"})
    exact: str
    found: dict[str, tuple[Adapter, ...]] = field(default_factory=dict, compare=False, repr=False)

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the adapters."""
        self.found["adapters"] = adapters_of(task.model, layout)

    def prepare(self, job: Job) -> None:
        """At a node, put model and base together from what it keeps and what it was sent."""
        given, kept = job.message.arrays, job.state.get(BASE)
        if "buffers" in given:
            return
        base, factors, keeps = given.get(BASE), given.get(FACTORS), True
        if base is not None:
            base = job.layout.buffers.expand(base)
        else:
            keeps = kept is not None or factors is None or not bool(factors[0])
            base = job.model.buffers.new_zeros(job.layout.buffer_dim) if kept is None else kept
            for rows, q in self._rounds(job, factors):
                base = moved(
                    base, self.found["adapters"], CHANGES[self.exact](self.found["adapters"], rows, q)
                )
        model = {"w": self.received(job, given), "buffers": base}
        job.message = Payload(model, {**job.message.values, KEEPS: keeps})

    def received(self, job: Job, given: Mapping[str, Tensor]) -> Tensor:
        """The model (d,): as it was sent, or with adapters that follow from seed and round beside the ``rest``."""
        if "w" in given:
            return given["w"]
        adapters, drawn = self.found["adapters"], job.values[DRAWN]
        assert isinstance(drawn, int)
        w = torch.zeros_like(job.model.w)
        if "rest" in given:
            w[other_entries(adapters, job.layout)] = given["rest"]
        fresh(w, adapters, job.seed, drawn)
        return w

    def finish(self, job: Job, w: Tensor) -> Update:
        """As usual; a node keeps its copy of the base."""
        update = super().finish(job, w)
        if (keeps := job.values.get(KEEPS)) is None:
            return update
        if not keeps:
            return replace(update, arrays={"delta": update.arrays["delta"].zero_()}, weight=0.0)
        return replace(update, state={BASE: job.message.arrays["buffers"]})

    def _rounds(self, job: Job, factors: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(()) if factors is None else entries(self.found["adapters"], factors[1:], job.layout.dim)


CHANGES: dict[str, Callable[[Adapters, Tensor, Tensor], list[Tensor]]] = {
    "residual": residuals,
    "product": products,
}


def other_entries(adapters: Adapters, layout: Layout) -> Tensor:
    """Places in ``w`` (d,), ascending, of the parameters that are no adapters'."""
    mask = layout.expand(torch.ones(layout.size, dtype=torch.bool))
    mask[places(adapters, layout.dim)] = False
    return torch.nonzero(mask).flatten()
