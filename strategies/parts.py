"""FedAvg over parts of a model: what is not trained, what stays with its client, what is trained in turn.

With low-rank adapters (Hu et al. 2022) these are FFA-LoRA (Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving
Federated Learning, ICLR 2024), FedSA-LoRA (Guo et al.: Selective Aggregation for Low-Rank Adaptation in Federated
Learning, ICLR 2025) and RoLoRA (Chen et al.: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA,
arXiv 2502.01755).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.parts import PartClient, TurnClient
from clients.sgd import SGDClient
from fedsim.errors import ConfigError
from fedsim.server.traits import Traits
from strategies.base import check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedParts(FedAvg):
    """FedAvg; parameters are named by patterns, such as ``*lora_A*``.

    ``frozen``: not trained (FFA: ``[*lora_A*]``). ``local``: trained, kept by each client and never sent; models are
    then personal, and a client that never took part has the initial ones (FedSA: ``[*lora_B*]``, B = 0). ``turns``:
    groups of patterns of which each round trains, sends and averages the next one, by the server's rounds from 0
    (RoLoRA: ``[[*lora_B*], [*lora_A*]]``, B first, since at B = 0 the gradient of A is zero); what fits none of them
    is trained in every round. What does not move does not travel.
    """

    traits: ClassVar[Traits] = FedAvg.traits
    frozen: Sequence[str] | None = None
    local: Sequence[str] | None = None
    turns: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        turns = tuple(tuple(t) for t in self.turns or ())
        check(len(turns) != 1, "turns", self.turns, "give at least two groups, or strategy.frozen")
        check(all(turns), "turns", self.turns, "a group is empty; name what it trains")
        if self.local and turns:
            raise ConfigError(
                "strategy.turns: what stays with its client and what rounds take in turn do not go together yet; "
                "leave strategy.local or strategy.turns out"
            )
        super().__post_init__()
        others = [tuple(p for other in turns if other is not turn for p in other) for turn in turns]
        silent = (tuple(self.local),) if self.local else tuple(others)
        self.traits = replace(  # type: ignore[misc]
            self.traits, frozen=tuple(self.frozen or ()), silent=silent, personal=bool(self.local)
        )

    def make_client(self) -> Client:
        """Local SGD of the parts."""
        local, turns = tuple(self.local or ()), tuple(tuple(t) for t in self.turns or ())
        if turns:
            return TurnClient(weighting=self.weighting, turns=turns)
        return (
            PartClient(weighting=self.weighting, local=local)
            if local
            else SGDClient(weighting=self.weighting)
        )
