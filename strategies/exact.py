"""The server half of methods that average the products B A of low-rank adapters, not the factors: what the factors
cannot hold goes into the base, which all clients share (``fedsim.task.lowrank``).

Single clients' factors are needed, side by side (M r (in + out) numbers a layer), never a product of one by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from clients.base import Client
from clients.exact import BASE, FACTORS, ExactClient, entry
from fedsim.exchange.fold import Fold
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import Message, Payload, Replies
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
    differ by client. The state's ``buffers`` hold what has been added to the bases, ``sent`` how many numbers
    all rounds have come to as they travel, and ``held`` (m,) how many of them each client has received; in a deployment
    ``log`` holds the last of these numbers themselves, as many as are worth sending.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        buffers=SERVER,
        changes_base=True,
        mean_only="any but the mean judges factors, whose coordinates mean little by themselves, since (G A, B G^-1) "
        "is the same update; type strategy.clip=1.0 to bound what a client changes, or strategy=ffa, whose clients "
        "share A",
    )
    exact: ClassVar[str]  # of ``clients.exact.CHANGES``: what a round adds to the base
    weighting: str
    clip: float | None = None
    client: Client = field(init=False)
    adapters: tuple[Adapter, ...] = field(init=False, default=(), repr=False, compare=False)
    layout: Layout = field(init=False, repr=False, compare=False)

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
        return ExactClient(weighting=self.weighting, exact=self.exact)

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the adapters."""
        self.adapters, self.layout = adapters_of(task.model, layout), layout

    def init(self, server: Server) -> State:
        """The model, and nothing sent so far."""
        state = super().init(server)
        state |= {"sent": 0, "held": torch.full((len(server.sizes),), NEVER)}
        return state | ({"log": state["w"].new_zeros(0)} if server.remote else {})

    def settle(self, state: State, rows: Tensor, q: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """Next ``w`` and ``buffers`` from single changes ``rows`` (M, d) and their weights ``q`` (M,), which sum to
        less than 1 where some were clipped."""
        raise NotImplementedError(f"{type(self).__name__} must define settle(state, rows, q, round)")

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Weigh, clip, settle, and note who holds what."""
        weights, held, lost = replies.weights, state["held"].clone(), list[int]()
        there = weights > 0
        if not bool(there.all()):  # nodes without their copy of the base: the whole of it, when next asked
            lost = [c for c, here in zip(replies.clients, there.tolist(), strict=True) if not here]
            held[lost], replies.log["out_of_sync"] = NEVER, lost
            if not bool(there.any()):
                return state | {"held": held}
        rows, clients = self.rows(replies)[there], [c for c in replies.clients if c not in lost]
        q = (weights[there] / weights.sum()).to(rows.dtype)
        if self.clip is not None:
            shrink = (self.clip / self.norms(state["w"], rows).clamp(min=1e-30)).clamp(max=1)
            replies.log["clipped_clients"] = int((shrink < 1).sum())
            q = q * shrink
        w, buffers = self.settle(state, rows, q, round)
        held[clients] = state["sent"]
        new = entry(self.adapters, self.trained(state, rows), q, [self.rank(c) for c in clients])
        log = {"log": torch.cat([state["log"], new])[-len(buffers) :]} if "log" in state else {}
        return state | {"w": w, "buffers": buffers, "held": held, "sent": state["sent"] + len(new)} | log

    def trained(self, state: State, rows: Tensor) -> Tensor:
        """Of single changes ``rows`` (M, d) what ``exact`` is worked out of."""
        return rows

    def rank(self, client: int) -> int:
        """How many ranks of the adapters a client trains."""
        return max(ad.rank for ad in self.adapters)

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

    # -- what goes over the links ---------------------------------------------------------------------------------

    def message(self, state: State, round: Round) -> Message:
        """The model; to nodes what each of them lacks."""
        if "log" not in state:
            return super().message(state, round)
        ways: dict[int, Payload] = {}
        for held in state["held"][list(round.cohort)].tolist():
            if held not in ways:
                ways[held] = self.missed(state, held)
        own = {c: ways[int(state["held"][c])].joined(self.own_values(c)) for c in round.cohort}
        return Message(each=own)

    def own_values(self, client: int) -> Payload:
        """What else a client is told."""
        return Payload()

    def missed(self, state: State, held: int, log: Tensor | None = None) -> Payload:
        """What a node receives that has ``held`` so many of the numbers sent: factors of the rounds since, and whether
        it builds on a copy of its own; or the whole change of the base, where that is smaller."""
        model, numbers = self.model_for(state, self.layout, held), int(state["sent"]) - max(held, 0)
        if numbers > self.layout.buffer_size:
            return model.joined(Payload({BASE: self.layout.buffers.compact(state["buffers"])}))
        if held == NEVER and not numbers:
            return model
        log = state["log"] if log is None else log
        start = log.new_tensor([float(held != NEVER)])
        return model.joined(Payload({FACTORS: torch.cat([start, log[len(log) - numbers :]])}))

    def model_for(self, state: State, layout: Layout, held: int) -> Payload:
        """What it receives of the adapters and of what is trained beside them."""
        return Payload({"w": state["w"]})

    def traffic(self, server: Server, state: State) -> Traffic | None:
        """Downwards each client gets the factors of the rounds that it missed, and works the changes of the base out of
        them, or the whole change where that is smaller: of a simulation, where all lies in shared memory once, counted
        as nodes of a deployment are sent it."""
        held, sizes = state["held"], dict[int, int]()
        whole = {h: int(state["sent"]) - max(h, 0) > self.layout.buffer_size for h in held.unique().tolist()}
        dense = sum(whole[int(held[c])] for c in server.round.cohort)
        server.log["base_change"] = {"factors": len(server.round.cohort) - dense, "dense": dense}
        if server.remote:
            return None
        blank = state["w"].new_ones(self.layout.buffer_size)  # no vector of zeros, which would travel packed
        received = np.zeros(len(server.sizes), dtype=np.int64)
        for c in server.round.cohort:
            if (h := int(held[c])) not in sizes:
                sizes[h] = sent_bytes(self.missed(state, h, blank), self.layout)
            received[c] = sizes[h] + sent_bytes(self.own_values(c), self.layout)
        return Traffic(None, received)
