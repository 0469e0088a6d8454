"""Local training only: what each client reaches alone, the floor of every personalised method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from clients.base import Client
from clients.local import LocalClient
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Replies
from fedsim.server.clientmetrics import means
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, Strategy


@dataclass(kw_only=True)
class LocalOnly(Strategy):
    """Every client trains its own model from the common start when it is in the cohort; nothing is shared.

    ``accuracy`` and ``loss`` are means over all clients of their own models on the common test set (the worst client
    beside them); the run's ``weights`` stay the initial ones.
    """

    client: Client = field(init=False, default_factory=LocalClient)
    traits: ClassVar[Traits] = Traits(
        personal=True,
        buffers="local",
        discloses="nothing leaves clients of LocalOnly; leave privacy out",
        mean_only="LocalOnly averages no vectors here; leave aggregator out",
    )
    fold: ClassVar[Fold] = {}

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Nothing to do: all state is the clients'."""
        return state

    def evaluate(self, server: Server, state: State) -> dict[str, float]:
        """Means and minimum over clients on the common test set."""
        if not server.test_size:
            return {}
        found = server.exchange(self.message(state, server.round), {}, task="test", clients=server.clients)
        out, each = means(found.ok), [o.metrics["accuracy"] for o in found.ok if "accuracy" in o.metrics]
        return out | ({"worst/accuracy": min(each)} if each else {})
