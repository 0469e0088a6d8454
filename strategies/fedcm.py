"""FedCM. Xu, Wang, Wang, Yao: FedCM: Federated Learning with Client-level Momentum, 2021 (arXiv 2106.10874,
Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from clients.base import Client
from clients.fedcm import FedCMClient
from clients.fednova import accumulated
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedCM(FedAvg):
    """Local steps along ``alpha g + (1 - alpha) D``; then ``D = -mean(x_K - x) / (K lr)`` with this round's lr.

    Where clients do different numbers of steps, K is their weighted mean.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, public_values=frozenset({"steps"}))
    alpha: float

    def make_client(self) -> Client:
        """Client-level momentum."""
        check(0 < self.alpha <= 1, "alpha", self.alpha, "the weight of the own gradient must lie in (0, 1]")
        return FedCMClient(weighting=self.weighting, alpha=self.alpha)

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """No steps, or more than were asked for: everybody's direction is divided by them."""
        steps, most = update.values.get("steps"), accumulated(asked.steps, asked.local.momentum)
        wrong = isinstance(steps, float | int) and not 1 <= steps <= most * (1 + 1e-9)
        return f"steps={steps!r}: must lie between 1 and {most:g}" if wrong else ""

    def init(self, server: Server) -> State:
        """Adds the direction ``D`` (d,) = 0."""
        state = super().init(server)
        return state | {"direction": torch.zeros_like(state["w"])}

    def message(self, state: State, round: Round) -> Message:
        """The model and the direction."""
        return Message.of({k: state[k] for k in ("w", "buffers", "direction") if len(state[k])})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move, and remember the direction moved per unit of local work."""
        delta = self.aggregate(replies)
        mean_steps = float(round.local.steps or 1)  # where a sum of noise alone must not be told from others
        if len(replies):
            steps = torch.tensor([float(k) for k in replies.values("steps")], dtype=torch.float64)  # type: ignore[arg-type]
            mean_steps = float(replies.weights @ steps / replies.weights.sum())
        return state | {
            "w": state["w"] + self.server_lr * delta,
            "direction": delta / -(mean_steps * round.lr),
        }
