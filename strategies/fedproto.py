"""FedProto. Tan, Long, Liu, Zhou, Lu, Jiang, Zhang: FedProto: Federated Prototype Learning across Heterogeneous
Clients, AAAI 2022 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from clients.base import Client
from clients.fedproto import FedProtoClient
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.clientmetrics import means, over_clients
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, check, miscounted
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedProto(FedAvg):
    """Clients share the means of their classes' features; each is pulled to the means over all clients (eq. 6).

    A class's prototype is the mean over the cohort's samples of it, and stays until it is renewed. ``share``:
    ``prototypes`` alone, models are personal (the paper; measured as the mean over all clients' own models on the
    common test set, by the class of the nearest prototype, with the numbers of the models' own heads under ``head/``);
    ``model`` averages the models besides, which gives one global model, measured by its head. ``pull``: of each
    sample's features (``samples``), or of a batch's class means (``means``).
    """

    traits: ClassVar[Traits] = replace(
        FedAvg.traits,
        features=True,
        labels=True,
        unread=dict.fromkeys(("server_lr", "weighting"), ("share", ("prototypes",))),
    )
    statistics: ClassVar[frozenset[str]] = frozenset({"features", "n"})
    lamb: float
    share: str
    pull: str = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.share == "prototypes"  # personal models keep their statistics
        only = (
            "FedProto averages no vectors here; leave aggregator out, or type strategy.share=model"
            if alone
            else ""
        )
        self.traits = replace(  # type: ignore[misc]
            self.traits, personal=alone, buffers="local" if alone else None, mean_only=only
        )

    def make_client(self) -> Client:
        """SGD with the pull to prototypes."""
        check(self.lamb >= 0, "lamb", self.lamb, "the weight of the pull must not be negative")
        check(self.share in ("prototypes", "model"), "share", self.share, "choose prototypes or model")
        check(self.pull in ("samples", "means"), "pull", self.pull, "choose samples or means")
        personal = self.share == "prototypes"
        return FedProtoClient(weighting=self.weighting, lamb=self.lamb, personal=personal, pull=self.pull)

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Sums of features and counts; with ``share=model`` the mean update too."""
        sums: dict[str, Any] = {"features": "sum", "n": "sum"}
        return sums | ({"delta": "mean"} if self.share == "model" else {})

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Counts that are none, or of more samples than there are."""
        return miscounted("n", asked, update)

    def message(self, state: State, round: Round) -> Message:
        """The model, and the prototypes once there are any."""
        message = super().message(state, round)
        more: dict[str, Any] = {k: state[k] for k in ("prototypes", "known") if k in state}
        return Message(Payload.of({**message.shared.arrays, **more}))

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """New prototypes of the classes that the cohort has."""
        n, sums = replies.total("n"), replies.total("features")
        fresh = sums / n.clamp(min=1)[:, None]
        if "prototypes" in state:
            fresh = fresh.where(n[:, None] > 0, state["prototypes"])
        known = ((n > 0) | (state.get("known", n * 0) > 0)).to(n.dtype)
        state = state | {"prototypes": fresh, "known": known}
        return super().update(state, replies, round) if self.share == "model" else state

    def evaluate(self, server: Server, state: State) -> dict[str, float]:
        """The global model's numbers; with personal models means over all clients on the common test set."""
        if self.share == "model" or not server.test_size:
            return super().evaluate(server, state)
        message, everybody = self.message(state, server.round), server.clients
        return means(server.exchange(message, {}, task="test", clients=everybody).ok)

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Numbers over all clients, each on its own test samples, with the prototypes at hand."""
        message, everybody = self.message(state, server.round), server.clients
        replies = server.exchange(message, {}, task="evaluate", clients=everybody)
        return over_clients(replies.ok, server.sizes, server.client_domains)
