"""SemiFL. Diao, Ding, Tarokh: SemiFL: Semi-Supervised Federated Learning for Unlabeled Clients with Alternate Training,
NeurIPS 2022 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from clients.base import Client
from clients.semifl import SemiFLClient
from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.semisupervised import ServerTrains, pseudo_shares

ORDERS = ("alternate", "parallel")


@dataclass(kw_only=True)
class SemiFL(ServerTrains):
    """Clients train on labels that the received model gives, the server then on its own.

    ``v <- beta_g v + (w - mean of the clients' w)``, ``w <- w - server_lr v``, parameters alone; server state ``v``
    (d,). ``order=parallel``: clients and server both start from ``w``, and are averaged half and half.
    """

    traits: ClassVar[Traits] = replace(ServerTrains.traits, labelled="server")
    tau: float
    alpha: float
    beta_g: float
    strong: str = "strong"
    order: str = "alternate"

    def make_client(self) -> Client:
        """Fixed labels and mixtures."""
        check(0 <= self.tau <= 1, "tau", self.tau, "probabilities lie in [0, 1]")
        check(self.alpha > 0, "alpha", self.alpha, "a of Beta(a, a) must be positive")
        check(0 <= self.beta_g < 1, "beta_g", self.beta_g, "the server's momentum must lie in [0, 1)")
        check(self.order in ORDERS, "order", self.order, f"choose one of {', '.join(ORDERS)}")
        return SemiFLClient(
            weighting=self.weighting, tau=self.tau, alpha=self.alpha, weak=self.weak, strong=self.strong
        )

    def init(self, server: Server) -> State:
        """Also the momentum, at rest."""
        state = super().init(server)
        return state | {"v": torch.zeros_like(state["w"])}

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """One step of SGD with momentum along the pseudo-gradient."""
        replies.log.update(pseudo_shares(replies.ok))
        v = self.beta_g * state["v"] - self.aggregate(replies)
        return state | {"v": v, "w": state["w"] - self.server_lr * v}

    def round(self, server: Server, state: State, round: Round) -> State:
        """Clients then server, or both at once."""
        if self.order == "alternate":
            return super().round(server, state, round)
        state = self.warmed(server, state, round)
        moved, alone = self.clients_round(server, state, round), self.trained(server, state)
        if moved is state:
            return alone
        return moved | {k: (moved[k] + alone[k]) / 2 for k in ("w", "buffers")}
