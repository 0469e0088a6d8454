"""SCAFFOLD. Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning, ICML 2020 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from clients.base import Client
from clients.scaffold import ScaffoldClient
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from strategies.base import State, Strategy, check, check_weighting


@dataclass(kw_only=True)
class Scaffold(Strategy):
    """Local steps along ``g - c_i + c``; ``x += server_lr mean(x_K - x)``; ``c += (1/m) sum_active (c_i+ - c_i)``.

    ``option``: 1 or 2, how clients renew ``c_i`` (see ``ScaffoldClient``). ``steps``: ``own`` divides by each client's
    true K; ``reference`` by ``epochs n_0 / batch`` of client 0 for all, as the FedSpeed authors' simulator does, a
    fraction where that client's last batch is short.
    """

    server_lr: float
    weighting: str
    option: int
    steps: str
    client: Client = field(init=False)
    fold: ClassVar[Fold] = {"delta": "mean", "c": "sum"}

    def __post_init__(self) -> None:
        check(self.server_lr > 0, "server_lr", self.server_lr, "must be positive")
        check(
            self.option in (1, 2),
            "option",
            self.option,
            "choose 1 (gradient at x^t) or 2 (reuse of the steps)",
        )
        check(self.steps in ("own", "reference"), "steps", self.steps, "choose one of own, reference")
        check_weighting(self.weighting)
        reference = self.steps == "reference"
        self.traits = replace(  # type: ignore[misc]
            self.traits, fixed_sizes=reference, asked_only=not reference, counts_clients=True
        )
        self.client = ScaffoldClient(option=self.option, weighting=self.weighting)

    def init(self, server: Server) -> State:
        """Adds the server's control variate ``c`` (d,) = 0."""
        state = super().init(server)
        state["c"] = torch.zeros_like(state["w"])
        if self.steps == "reference":
            local = server.local
            state["steps"] = (
                local.steps or local.epochs * int(server.sizes[server.clients[0]]) / local.batch_size
            )
        return state

    def message(self, state: State, round: Round) -> Message:
        """The model and ``c``."""
        arrays = {k: state[k] for k in ("w", "buffers", "c") if len(state[k])}
        return Message.of(arrays, {"steps": state.get("steps")})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move the model along the mean update and ``c`` by the absent clients' share too: the sum over m."""
        return state | {
            "w": state["w"] + self.server_lr * self.aggregate(replies),
            "c": state["c"] + self.total(replies, "c") / round.num_clients,
        }
