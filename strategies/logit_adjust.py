"""Logit adjustment under federation. Menon, Jayasumana, Rawat, Jain, Veit, Kumar: Long-tail Learning via Logit
Adjustment, ICLR 2021 (eq. 10). With each client's own prior it is the idea of FedLC: Zhang, Li, Li, Sun, Ding, Zhang:
Federated Learning with Label Distribution Skew via Logits Calibration, ICML 2022."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.prior import LogitAdjustClient
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, check, miscounted
from strategies.fedavg import FedAvg

ABSENT = -1e4  # log share of a class that nobody has: finite, so that the state is


@dataclass(kw_only=True)
class LogitAdjust(FedAvg):
    """FedAvg with clients that train on ``logits + tau log prior``.

    ``prior``: ``client``, its own class shares; ``all``, those of all clients together, which every client's counts
    are asked for once, before the first round.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, labels=True, logits=True)
    tau: float
    prior: str
    counting: ClassVar[Fold] = {"counts": "sum"}

    def __post_init__(self) -> None:
        super().__post_init__()
        all_count = self.prior == "all"
        said = "clients count their classes, without noise; type strategy.prior=client" if all_count else ""
        counted = frozenset(self.counting) if all_count else frozenset()
        self.traits = replace(  # type: ignore[misc]
            self.traits, meets_all_clients=all_count, discloses=said, counted=counted
        )

    def make_client(self) -> Client:
        """The adjusted loss."""
        check(self.tau >= 0, "tau", self.tau, "the weight of the prior must not be negative")
        check(self.prior in ("client", "all"), "prior", self.prior, "choose one of client, all")
        return LogitAdjustClient(weighting=self.weighting, tau=self.tau)

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Counts that are none, or of more samples than there are."""
        return miscounted("counts", asked, update)

    def message(self, state: State, round: Round) -> Message:
        """The model, and the prior of all."""
        arrays = dict(super().message(state, round).shared.arrays)
        return Message.of(arrays | ({"prior": state["prior"]} if "prior" in state else {}))

    def round(self, server: Server, state: State, round: Round) -> State:
        """Count first, where that is wanted."""
        if self.prior == "all" and "prior" not in state:
            everyone = server.clients
            replies = server.exchange(Message(), self.counting, task="counts", clients=everyone)
            if not replies.clients:  # of too few, masks stay on the sum
                return state
            counts = replies.total("counts").double()
            share = (counts / counts.sum()).log().clamp_min(ABSENT)
            state = state | {"prior": share.to(state["w"])}
        return super().round(server, state, round)
