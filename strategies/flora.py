"""FLoRA. Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations, NeurIPS 2024."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from clients.base import Client
from clients.exact import DRAWN, fresh, moved, other_entries, products, wide
from clients.flora import FLoRAClient, kept_places, rank_of
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from strategies.base import State, check
from strategies.exact import NEVER, ExactAverage


@dataclass(kw_only=True)
class FLoRA(ExactAverage):
    """Each round begins with fresh adapters, B = 0; what clients have learnt, ``sum p_i s B_i A_i``, stacked, goes into
    the base, and the next adapters are drawn.

    A is the same for all clients of a round, drawn from (seed, round): uniform on +-1/sqrt(in). ``ranks``: client k
    trains, and sends, the first ``ranks[k mod n]`` of the model's r; with the model's scale s for all, which is
    alpha_i = s r_i, as in the authors' settings.
    """

    exact = "product"
    ranks: Sequence[int] | None = None
    dim: int = field(init=False, default=0, repr=False, compare=False)
    places: dict[int, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        good = self.ranks is None or (len(self.ranks) > 0 and all(r >= 1 for r in self.ranks))
        check(good, "ranks", self.ranks, "give whole numbers from 1, or null")
        super().__post_init__()

    def make_client(self) -> Client:
        """Local SGD, of as many ranks as the client has."""
        if self.ranks is None:
            return super().make_client()
        return FLoRAClient(weighting=self.weighting, exact=self.exact, ranks=tuple(self.ranks))

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Single updates, which have lengths of their own where ranks differ."""
        return {"delta": "stack"} if self.ranks is None else {"factors": "cat"}

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the adapters; refuse ranks that they have not."""
        super().setup(task, layout)
        self.dim = layout.dim
        least = min(ad.rank for ad in self.adapters)
        top = max(self.ranks or [0])
        check(top <= least, "ranks", list(self.ranks or ()), f"at most {least}; type model.lora.r={top}")
        if self.ranks is not None:
            self.places = {r: kept_places(self.adapters, layout, r) for r in sorted(set(self.ranks))}

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """An update that is not as long as its client's rank makes it."""
        if self.ranks is None or "factors" not in update.arrays:
            return ""
        wanted, found = asked.message.values.get("numbers"), update.arrays["factors"].numel()
        return "" if found == wanted else f"'factors' holds {found} numbers, expected {wanted!r} by its rank"

    def own_values(self, client: int) -> Payload:
        """Where ranks differ, how many numbers it is to send."""
        return Payload({}, {} if self.ranks is None else {"numbers": len(self.places[self.rank(client)])})

    def init(self, server: Server) -> State:
        """The model; what its adapters have learnt before goes into the bases, so that B = 0."""
        state = super().init(server)
        changes = [ad.scale * (b @ a) for ad in self.adapters for a, b in [wide(*ad.factors(state["w"]))]]
        state["buffers"] = moved(state["buffers"], self.adapters, changes)
        if bool(state["buffers"].any()):
            state["sent"] = server.layout.buffer_size + 1  # nobody can do without the whole of it
        for ad in self.adapters:
            ad.factors(state["w"])[1].zero_()
        return state | {"drawn": 0}

    def rows(self, replies: Replies) -> Tensor:
        """Single changes (M, d); ranks that a client has not stay zero."""
        if self.ranks is None:
            return super().rows(replies)
        sent = replies.cat("factors")
        rows, start = sent.new_zeros(len(replies), self.dim), 0
        for row, client in zip(rows, replies.clients, strict=True):
            places = self.places[rank_of(self.ranks, client)]
            row[places] = sent[start : start + len(places)]
            start += len(places)
        return rows

    def settle(self, state: State, rows: Tensor, q: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """The sum of products into the bases, and the adapters of the next round."""
        changes = products(self.adapters, self.trained(state, rows), q)
        w = self.averaged(state["w"], rows, q)
        fresh(w, self.adapters, round.seed, round.index + 1)
        return w, moved(state["buffers"], self.adapters, changes)

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """And note under which round adapters were drawn."""
        new = super().update(state, replies, round)
        return new | {"drawn": round.index + 1} if new["sent"] > state["sent"] else new

    def trained(self, state: State, rows: Tensor) -> Tensor:
        """The clients' own models."""
        out: Tensor = state["w"] + rows
        return out

    def rank(self, client: int) -> int:
        """Its own, or all."""
        return super().rank(client) if self.ranks is None else rank_of(self.ranks, client)

    def model_for(self, state: State, layout: Layout, held: int) -> Payload:
        """Fresh adapters follow from (seed, round); those of the first round are the model's."""
        if held == NEVER:
            return Payload({"w": state["w"]})
        rest = state["w"][other_entries(self.adapters, layout)]
        return Payload({"rest": rest} if len(rest) else {}, {DRAWN: state["drawn"]})
