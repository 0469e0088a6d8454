"""FedAvg over parts of a model: what is not trained, what stays with its client, what is trained in turn.

With low-rank adapters (Hu et al. 2022) these are FFA-LoRA (Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving
Federated Learning, ICLR 2024), FedSA-LoRA (Guo et al.: Selective Aggregation for Low-Rank Adaptation in Federated
Learning, ICLR 2025) and RoLoRA (Chen et al.: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA,
arXiv 2502.01755).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from clients.base import Client
from clients.parts import PartClient, SharedStartClient, TurnClient, entries
from clients.sgd import SGDClient
from fedsim.errors import ConfigError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout
from fedsim.task.lowrank import NO_ADAPTERS
from fedsim.task.task import Task
from strategies.base import State, check
from strategies.fedavg import FedAvg

NEW_CLIENT = ("zero", "mean")
HEADS = ("average", "local")


@dataclass(kw_only=True)
class FedParts(FedAvg):
    """FedAvg; parameters are named by patterns, such as ``*lora_A*``.

    ``frozen``: not trained (FFA: ``[*lora_A*]``). ``local``: trained, kept by each client and never sent; models are
    then personal, and a client that never took part has the initial ones (FedSA: ``[*lora_B*]``, B = 0). ``turns``:
    groups of patterns of which each round trains, sends and averages the next one, by the server's rounds from 0
    (RoLoRA: ``[[*lora_B*], [*lora_A*]]``, B first, since at B = 0 the gradient of A is zero); what fits none of them
    is trained in every round. What does not move does not travel.

    ``new_client``: what a client that never took part begins with in the place of what others keep: ``zero``, the
    initial values, or ``mean``, their mean over those who answered in the last round; then what is kept travels too,
    upwards always and downwards to newcomers. State: the mean lies in ``w``, ``seen`` (m,) says who took part.

    ``head``: what is trained beside adapters, such as a new classifier, is ``average``d or ``local`` too (FedSA).
    """

    traits: ClassVar[Traits] = FedAvg.traits
    frozen: Sequence[str] | None = None
    local: Sequence[str] | None = None
    turns: Sequence[Sequence[str]] | None = None
    new_client: str = "zero"
    head: str = "average"
    places: Tensor = field(init=False, default_factory=lambda: torch.empty(0), repr=False, compare=False)

    def __post_init__(self) -> None:
        turns = tuple(tuple(t) for t in self.turns or ())
        check(len(turns) != 1, "turns", self.turns, "give at least two groups, or strategy.frozen")
        check(all(turns), "turns", self.turns, "a group is empty; name what it trains")
        if self.local and turns:
            raise ConfigError(
                "strategy.turns: what stays with its client and what rounds take in turn do not go together yet; "
                "leave strategy.local or strategy.turns out"
            )
        check(
            self.new_client in NEW_CLIENT,
            "new_client",
            self.new_client,
            f"choose one of {', '.join(NEW_CLIENT)}",
        )
        check(
            self.local is not None or self.new_client == "zero",
            "new_client",
            self.new_client,
            "nothing stays with clients; type strategy.local=[PATTERN], or leave it out",
        )
        check(self.head in HEADS, "head", self.head, f"choose one of {', '.join(HEADS)}")
        check(
            self.local is not None or self.head == "average",
            "head",
            self.head,
            "nothing else stays with clients; type strategy.local=[PATTERN], or leave it out",
        )
        super().__post_init__()
        others = [tuple(p for other in turns if other is not turn for p in other) for turn in turns]
        silent = (self.kept,) if self.local else tuple(others)
        self.traits = replace(  # type: ignore[misc]
            self.traits, frozen=tuple(self.frozen or ()), silent=silent, personal=bool(self.local)
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """Patterns of what stays with its client."""
        return (*(self.local or ()), *([NO_ADAPTERS] if self.head == "local" else []))

    def make_client(self) -> Client:
        """Local SGD of the parts."""
        local, turns = self.kept, tuple(tuple(t) for t in self.turns or ())
        if turns:
            return TurnClient(weighting=self.weighting, turns=turns)
        if not local:
            return SGDClient(weighting=self.weighting)
        kind = SharedStartClient if self.new_client == "mean" else PartClient
        return kind(weighting=self.weighting, local=local)

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Changes; and where newcomers begin with the mean of what is kept, that."""
        return {"delta": "mean"} | ({"own": "mean"} if self.new_client == "mean" else {})

    def setup(self, task: Task, layout: Layout) -> None:
        """Where in the model what is kept lies.

        Raises:
            ConfigError: for trained adapters of an embedding that patterns of factors pass over.
        """
        patterns = (
            *(self.frozen or ()),
            *(self.local or ()),
            *(p for turn in self.turns or () for p in turn),
        )
        factors = [p for p in patterns if "lora_" in p]
        passed = [s.name for s in layout.params if "lora_embedding_" in s.name]
        if factors and passed and not any("lora_embedding_" in p for p in factors):
            raise ConfigError(
                f"strategy: '{passed[0]}' is of an embedding's adapter, whose A begins at zero and B is drawn, and no "
                f"pattern of {factors} fits it; leave embeddings out of model.lora.target_modules, type "
                "strategy=fedit, or name it, too, in strategy.frozen, local or turns"
            )
        if self.new_client == "mean":
            self.places = entries(layout, self.kept)

    def init(self, server: Server) -> State:
        """The model; nobody took part yet."""
        state = super().init(server)
        return state | (
            {"seen": torch.zeros(len(server.sizes), dtype=torch.bool)} if len(self.places) else {}
        )

    def message(self, state: State, round: Round) -> Message:
        """The model; of what is kept, newcomers alone receive the mean."""
        if not len(self.places):
            return super().message(state, round)
        w, mean = state["w"].clone(), state["w"][self.places]
        w[self.places] = 0
        new = [c for c in round.cohort if not state["seen"][c]] if bool(mean.any()) else []
        return replace(
            super().message(state | {"w": w}, round), each={c: Payload({"newcomer": mean}) for c in new}
        )

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move along the mean update, which leaves out what is kept; note the mean of that."""
        new = super().update(state, replies, round)
        if not len(self.places):
            return new
        seen = state["seen"].clone()
        seen[replies.clients] = True
        new["w"][self.places] = self.aggregate(replies, "own")
        return new | {"seen": seen}
