"""FedAvg. McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from clients.base import Client
from clients.sgd import SGDClient
from fedsim.exchange.payload import Replies
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.aggregators import is_mean
from strategies.base import State, Strategy, check, check_weighting


@dataclass(kw_only=True)
class FedAvg(Strategy):
    """Local SGD, then ``x <- x + server_lr * mean(x_K - x)``.

    ``weighting``: ``samples`` weighs clients by n_i (the paper's n_k / n), ``uniform`` equally.
    """

    traits: ClassVar[Traits] = Traits(asked_only=True)
    server_lr: float
    weighting: str
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        check(self.server_lr > 0, "server_lr", self.server_lr, "must be positive")
        check_weighting(self.weighting)
        self.client = self.make_client()

    def make_client(self) -> Client:
        """The local half; what methods that change only the local rule override."""
        return SGDClient(weighting=self.weighting)

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move along the mean update."""
        step, w = self.aggregate(replies), state["w"]
        if (
            is_mean(self.aggregator) and type(self).aggregate is Strategy.aggregate
        ):  # fresh: w + lr * step in its place
            return state | {"w": step.mul_(self.server_lr).add_(w)}
        return state | {"w": w + self.server_lr * step}
