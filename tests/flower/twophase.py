"""A method of two exchanges a round, with client state made in both and a part of the message for each client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from clients.base import Client
from fedsim.exchange.payload import Message, Payload, Update
from strategies.base import Strategy


class TwoPhaseClient(Client):
    """First its mean gradient, then training along with its own share of everybody's."""

    def init_state(self, layout: Any) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros(layout.dim), "rounds": torch.zeros(1)}

    def measure(self, job: Any) -> Update:
        job.start()
        g = job.full_gradient(job.anchor)
        seen = 0.5 * job.state["seen"] + g
        return Update(
            {"g": seen}, len(job.data), {"norm": float(g.norm())}, state={**job.state, "seen": seen}
        )

    def finish(self, job: Any, w: torch.Tensor) -> Update:
        delta = job.delta(w) - job.lr * (job.message.arrays["share"] - job.state["seen"])
        count = job.state["rounds"] + job.values["scale"]
        return Update(
            {"delta": delta}, len(job.data), state={**job.state, "rounds": count}, metrics=job.report()
        )


@dataclass(kw_only=True)
class TwoPhase(Strategy):
    """SGD corrected by decayed mean gradients that are gathered first."""

    client: ClassVar[Client] = TwoPhaseClient()

    def round(self, server: Any, state: Any, round: Any) -> Any:
        first = server.exchange(self.message(state, round), {"g": ("mean", "sum")}, task="measure")
        if not len(first):
            return state
        norms = dict(zip(first.clients, first.values("norm"), strict=True))
        message = Message(
            Payload.of(dict(self.message(state, round).shared.arrays), {"scale": 1.0}),
            {c: Payload.of({"share": first.mean("g") * (1 + 0.1 * n / (1 + n))}) for c, n in norms.items()},
        )
        second = server.exchange(message, self.fold, clients=first.clients)
        return state | {"w": state["w"] + second.mean("delta")} if len(second) else state
