"""Adapters of ranks of the clients' own under FedAvg. With zeros in the place of ranks that a client has not: Cho, Liu,
Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, 2024 (arXiv 2401.06432;
of HetLoRA this alone). By singular values: Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models
under Heterogeneous Tasks and Client Resources, NeurIPS 2024 (FlexLoRA, arXiv 2402.11505).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clients.base import Client
from clients.exact import fresh, products
from clients.flora import RankedClient, kept_places, rank_of
from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of, truncated
from fedsim.task.task import Task
from strategies.base import State, Strategy, check, check_weighting
from strategies.exact import ExactAverage

COMBINE = ("pad", "svd")
DEAD = 1e-7  # a singular value below this share of the largest is none


@dataclass(kw_only=True)
class RankedLoRA(Strategy):
    """Client k trains, sends and receives the first ``ranks[k mod n]`` of the model's r.

    ``combine``: ``pad``, the mean of A and of B with zeros for ranks that a client has not, which pulls the high ranks
    towards zero and has FedIT's cross term; ``svd``, the best factors of rank r of the exact ``sum p_i B_i A_i``, whose
    first ranks are the best of any lower rank. What r ranks cannot hold is lost: ``truncated`` is the largest share of
    a layer's change, by Frobenius norms. A rank without a singular value begins anew, with B = 0.
    """

    traits: ClassVar[Traits] = Traits(asked_only=True, mean_only=ExactAverage.traits.mean_only)
    fold: ClassVar[Fold] = {"factors": "cat"}
    weighting: str
    ranks: Sequence[int] | None
    combine: str
    client: Client = field(init=False)
    adapters: tuple[Adapter, ...] = field(init=False, default=(), repr=False, compare=False)
    dim: int = field(init=False, default=0, repr=False, compare=False)
    places: dict[int, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        good = bool(self.ranks) and all(r >= 1 for r in self._ranks)
        check(good, "ranks", self.ranks, "give whole numbers from 1, e.g. [4, 2]")
        check(self.combine in COMBINE, "combine", self.combine, f"choose one of {', '.join(COMBINE)}")
        self.client = RankedClient(weighting=self.weighting, ranks=self._ranks)

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the adapters; refuse ranks that they have not."""
        self.adapters, self.dim = adapters_of(task.model, layout), layout.dim
        for ad in self.adapters:
            if len(ad.a.shape) != 2:
                raise ConfigError(
                    f"strategy=ranked_lora: the factors of '{ad.name}' are no matrices, as of a convolution; name "
                    "other layers in model.lora.target_modules, or type strategy=fedit"
                )
        least = min((ad.rank for ad in self.adapters), default=0)
        top = max(self._ranks)
        check(top <= least, "ranks", list(self._ranks), f"at most {least}; type model.lora.r={top}")
        self.places = {r: kept_places(self.adapters, layout, r) for r in sorted(set(self._ranks))}

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """An update that is not as long as its client's rank makes it."""
        if "factors" not in update.arrays:
            return ""
        wanted, found = (m.arrays["factors"].numel() for m in (asked.message, update))
        return "" if found == wanted else f"'factors' holds {found} numbers, expected {wanted} by its rank"

    def message(self, state: State, round: Round) -> Message:
        """To each client the numbers of its rank."""
        parts = {r: Payload({"factors": state["w"][at]}) for r, at in self.places.items()}
        each = {c: parts[rank_of(self._ranks, c)] for c in round.cohort}
        return Message(Payload({"buffers": state["buffers"]} if len(state["buffers"]) else {}), each)

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """The weighted mean of the clients' models; factors as ``combine`` says."""
        total = float(replies.weights.sum())
        if not total > 0:
            raise ClientError(f"the mean needs a positive total weight, got {total}")
        w, sent, start = state["w"], replies.cat("factors"), 0
        q, rows = (replies.weights / total).to(w.dtype), w.new_zeros(len(replies), self.dim)
        for row, client in zip(rows, replies.clients, strict=True):
            at = self._own(client)
            row[at] = w[at] + sent[start : start + len(at)]
            start += len(at)
        new = torch.tensordot(q, rows, 1)
        if self.combine == "svd":
            replies.log["truncated"] = self._split(new, rows, q, round)
        return state | {"w": new}

    def _split(self, new: Tensor, rows: Tensor, q: Tensor, round: Round) -> float:
        """Put the best factors of the exact sums into ``new`` (d,); the largest share that is lost."""
        lost, drawn = 0.0, torch.zeros_like(new)
        fresh(drawn, self.adapters, round.seed, round.index + 1)
        for ad, change in zip(self.adapters, products(self.adapters, rows, q), strict=True):
            (a, b), (start, _) = ad.factors(new), ad.factors(drawn)
            found_a, found_b, error = truncated(change / ad.scale, ad.rank)
            size = found_b.square().sum(0)  # the singular values
            dead = size <= DEAD * size.max()
            a.copy_(start)
            b.zero_()
            live = torch.nonzero(~dead).flatten()
            a[live], b[:, live] = found_a[live].to(a.dtype), found_b[:, live].to(b.dtype)
            lost = max(lost, error)
        return lost

    @property
    def _ranks(self) -> tuple[int, ...]:
        return tuple(self.ranks or ())

    def _own(self, client: int) -> Tensor:
        return self.places[rank_of(self._ranks, client)]
