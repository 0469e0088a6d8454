"""The server half of methods that average the products B A of low-rank adapters, not the factors: what the factors
cannot hold goes into the base, which all clients share (``fedsim.task.lowrank``).

Single clients' factors are needed, side by side (M r (in + out) numbers a layer), never a product of one by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clients.base import Client
from clients.sgd import SGDClient
from fedsim.errors import ClientError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Replies
from fedsim.local.kept import SERVER
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of, product_norm
from fedsim.task.task import Task
from fedsim.topology.traffic import Traffic
from strategies.base import State, Strategy, check, check_weighting

NEVER = -1  # of ``held``: the client has received nothing yet


@dataclass(kw_only=True)
class ExactAverage(Strategy):
    """Base of FedEx-LoRA and FLoRA: ``settle`` says what becomes of factors and bases.

    Parameters beside the adapters (``modules_to_save``) are averaged as usual. ``clip``: a client's change of all
    products ``s B A`` together is scaled down to this Frobenius norm, the rule that makes sense for factors whose bases
    differ by client. The state's ``buffers`` hold what has been added to the bases, ``sent`` how many numbers of
    factors all rounds have come to, and ``held`` (m,) how many of them each client has received.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        buffers=SERVER,
        changes_base=True,
        mean_only="any but the mean judges factors, whose coordinates mean little by themselves, since (G A, B G^-1) "
        "is the same update; type strategy.clip=1.0 to bound what a client changes, or strategy=ffa, whose clients "
        "share A",
    )
    weighting: str
    clip: float | None = None
    client: Client = field(init=False)
    adapters: tuple[Adapter, ...] = field(init=False, default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check(self.clip is None or self.clip > 0, "clip", self.clip, "must be positive, or null")
        self.client = self.make_client()

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Single updates."""
        return {"delta": "stack"}

    def make_client(self) -> Client:
        """Local SGD of both factors."""
        return SGDClient(weighting=self.weighting)

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the adapters."""
        self.adapters = adapters_of(task.model, layout)

    def init(self, server: Server) -> State:
        """The model, and nothing sent so far."""
        return {**super().init(server), "sent": 0, "held": torch.full((len(server.sizes),), NEVER)}

    def settle(self, state: State, rows: Tensor, q: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """Next ``w`` and ``buffers`` from single changes ``rows`` (M, d) and their weights ``q`` (M,), which sum to
        less than 1 where some were clipped."""
        raise NotImplementedError(f"{type(self).__name__} must define settle(state, rows, q, round)")

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Weigh, clip, settle, and note who holds what."""
        rows = self.rows(replies)
        total = float(replies.weights.sum())
        if not total > 0:
            raise ClientError(f"the mean of the clients' products needs a positive total weight, got {total}")
        q = (replies.weights / total).to(rows.dtype)
        if self.clip is not None:
            shrink = (self.clip / self.norms(state["w"], rows).clamp(min=1e-30)).clamp(max=1)
            replies.log["clipped_clients"] = int((shrink < 1).sum())
            q = q * shrink
        w, buffers = self.settle(state, rows, q, round)
        held, sent = state["held"].clone(), int(state["sent"])
        held[replies.clients] = sent
        return state | {"w": w, "buffers": buffers, "held": held, "sent": sent + self.numbers(replies)}

    def rows(self, replies: Replies) -> Tensor:
        """Single changes (M, d) of the model."""
        return replies.stack("delta")

    def norms(self, w: Tensor, rows: Tensor) -> Tensor:
        """Frobenius norm (M,) of what each client changed of all products ``s B A`` together."""
        squares = rows.new_zeros(len(rows))
        for ad in self.adapters:
            (a, b), (da, db) = ad.factors(w), ad.factors(rows)
            n = len(rows)
            left = torch.cat([b.expand(n, -1, -1), db], dim=-1)  # (M, out, 2 r): B dA + dB (A + dA)
            right = torch.cat([da, a + da], dim=-2)
            squares += product_norm(right, left, ad.scale).square()
        return squares.sqrt()

    def averaged(self, w: Tensor, rows: Tensor, q: Tensor) -> Tensor:
        """``w`` (d,) moved along the weighted sum of the changes."""
        out: Tensor = w + torch.tensordot(q, rows, 1)
        return out

    def numbers(self, replies: Replies) -> int:
        """Numbers of all factors that the round's clients sent."""
        return len(replies) * sum(ad.rank * ad.width for ad in self.adapters)

    # -- what goes over the links ---------------------------------------------------------------------------------

    def traffic(self, server: Server, state: State) -> Traffic | None:
        """Downwards each client gets the factors of the rounds that it missed, and works the changes of the base out of
        them, or the whole change where that is smaller. Counted so in simulations, where all of it lies in shared
        memory once; nodes of a deployment are sent the whole change, since they keep nothing between rounds."""
        if server.remote:
            return None
        itemsize, cohort = state["w"].element_size(), server.round.cohort
        received, held = np.zeros(len(server.sizes), dtype=np.int64), state["held"]
        dense, ways = sum(ad.dense for ad in self.adapters), {"factors": 0, "dense": 0}
        rest = server.layout.size - sum(ad.rank * ad.width for ad in self.adapters)
        for c in cohort:
            missed = int(state["sent"]) - max(int(held[c]), 0)
            whole = missed > dense
            ways["dense" if whole else "factors"] += 1
            beside = server.layout.size if self.needs_model(whole, int(held[c])) else rest
            received[c] = (min(missed, dense) + beside) * itemsize
        server.log["base_change"] = ways
        return Traffic(None, received)

    def needs_model(self, whole: bool, held: int) -> bool:
        """Whether a client is sent the adapters too, by what it is sent of the base and has ``held``."""
        return whole or held == NEVER


def moved(state: State, adapters: tuple[Adapter, ...], changes: list[Tensor]) -> Tensor:
    """The state's ``buffers`` with ``changes`` (out, in) added to those of the adapters' bases."""
    buffers: Tensor = state["buffers"].clone()
    for ad, change in zip(adapters, changes, strict=True):
        ad.change_of(buffers).add_(change.to(buffers.dtype))
    return buffers


def wide(*tensors: Tensor) -> list[Any]:
    """In float64, in which products are added up."""
    return [t.double() for t in tensors]
