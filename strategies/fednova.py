"""FedNova. Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization, NeurIPS 2020 (eq. 4 with section 4.2's normalisers)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from clients.base import Client
from clients.fednova import FedNovaClient, accumulated
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedNova(FedAvg):
    """``x += server_lr tau_eff sum_i p_i (x_K - x) / |a_i|_1`` with ``tau_eff = sum_i p_i |a_i|_1``.

    ``p_i`` are the cohort's weights; with equal work it is FedAvg.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, public_values=frozenset({"work"}))

    def make_client(self) -> Client:
        """SGD with a normalised update."""
        return FedNovaClient(weighting=self.weighting)

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Work that is not positive, or more than its steps are: it scales everybody's update."""
        work, most = update.values.get("work"), accumulated(asked.steps, asked.local.momentum) * (1 + 1e-9)
        wrong = isinstance(work, float | int) and not 0 < work <= most
        return f"work={work!r}: must be positive and at most {most:g}" if wrong else ""

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Rescale the mean normalised update by the effective work."""
        effective = accumulated(
            round.local.steps or 1, round.local.momentum
        )  # where nobody answered: of noise alone
        if len(replies):
            work = torch.tensor([float(v) for v in replies.values("work")], dtype=torch.float64)  # type: ignore[arg-type]
            effective = float(replies.weights @ work / replies.weights.sum())
        return state | {"w": state["w"] + self.server_lr * effective * self.aggregate(replies)}
