"""The server half of methods with persistent client duals (FedDyn, FedSpeed): one extra vector, the mean dual."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from clients.base import Client
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from strategies.base import State, Strategy, check, check_weighting


@dataclass(kw_only=True)
class DualStrategy(Strategy):
    """``hbar += (1/m) sum_i (x_K - x_start)`` over all m clients, then ``x <- x + mean(x_K - x) + hbar``.

    ``beta`` starts local training at ``x + beta (x - last local model)``. ``dual_mean``: ``all`` adds the mean dual
    over all m clients, with one server vector ``hbar``; ``active`` the mean over the cohort, as FedSpeed is published,
    which does not converge under partial participation. ``weighting`` of the mean: ``uniform`` or by ``samples``.
    """

    beta: float
    dual_mean: str
    weighting: str
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        check(self.dual_mean in ("all", "active"), "dual_mean", self.dual_mean, "choose one of all, active")
        check_weighting(self.weighting)
        counts = self.dual_mean == "all"
        self.traits = replace(self.traits, asked_only=True, counts_clients=counts)  # type: ignore[misc]

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """The update's mean, and the plain sum that moves the mean dual."""
        if self.dual_mean == "active":
            return {"delta": "mean", "h": "mean"}
        delta = {"delta": ("mean", "sum") if self.weighting == "samples" else "sum"}
        return delta | ({"moved": "sum"} if self.beta else {})

    def init(self, server: Server) -> State:
        """Adds ``hbar`` (d,), the mean of all clients' duals h_i."""
        state = super().init(server)
        return state | ({"hbar": torch.zeros_like(state["w"])} if self.dual_mean == "all" else {})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """One server step; without replies it is not called, so ``hbar`` is never added twice."""
        delta = self.aggregate(replies)
        if self.dual_mean == "active":
            return state | {"w": state["w"] + delta + self.aggregate(replies, "h")}
        moved = self.total(replies, "moved" if self.beta else "delta")
        hbar = state["hbar"] + moved / round.num_clients
        return state | {"w": state["w"] + delta + hbar, "hbar": hbar}
