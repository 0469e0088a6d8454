"""IFCA. Ghosh, Chung, Yin, Ramchandran: An Efficient Framework for Clustered Federated Learning, NeurIPS 2020
(Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from clients.clustered import ClusterClient
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.vectors import Weights
from strategies.base import State, Strategy, check
from strategies.clustered import LOST, Clustered, apart, check_k, moved, starters

SHORT = 5  # rounds of each of the ``restarts``


def ifca_pick(losses: Tensor) -> Tensor:
    """The cluster (n,) of each client from its losses (n, k) under every centre; ties go to the lowest."""
    return torch.from_numpy(losses.numpy().argmin(1))


def ifca_update(centres: Tensor, picks: Tensor, deltas: Tensor, weights: Tensor) -> Tensor:
    """``theta_j + sum_{i in j} a_i delta_i`` (k, d), ``a_i`` weights (n,) over their sum in j; nobody: unchanged."""
    out = centres.clone()
    for j in range(len(centres)):
        a = weights * (picks == j)
        if float(a.sum()) > 0:
            out[j] = centres[j] + (a / a.sum()).to(deltas) @ deltas
    return out


@dataclass(kw_only=True)
class IFCA(Clustered):
    """Clients receive all ``k`` centres, choose that with the least loss over their training samples, train from it,
    and are averaged with those that chose the same.

    ``start``: ``spread``: up to ``spread_clients`` clients train ``spread_epochs`` from the common start, and centres
    are k of their models far from each other; ``random``: k initial draws, with ``restarts`` > 1 the draws of which,
    after 5 short rounds each with these clients, the sum of the chosen losses is least. ``update``: ``model`` or
    ``gradient``, one gradient over all samples instead of training. ``k=1`` is FedAvg. What a client weighs in its
    cluster is ``base.weighting``.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        discloses="clients of IFCA say which cluster they belong to, which no noise covers; type strategy=fedavg",
        unread={"restarts": ("start", ("spread",)), "spread_epochs": ("start", ("random",))},
    )
    choice: ClassVar[str] = "loss"
    k: int
    start: str
    restarts: int
    spread_clients: int
    spread_epochs: int
    update: InitVar[str]  # the method keeps its name on the object

    def __post_init__(self, update: str) -> None:
        super().__post_init__()
        check(self.k >= 1, "k", self.k, "at least one cluster")
        check(self.start in ("spread", "random"), "start", self.start, "choose one of spread, random")
        check(update in ("model", "gradient"), "update", update, "choose one of model, gradient")
        for name in ("restarts", "spread_epochs"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        enough = self.spread_clients >= self.k
        check(enough, "spread_clients", self.spread_clients, f"fewer than the {self.k} clusters to start")
        asks = self.k > 1 and (self.start == "spread" or self.restarts > 1)
        self.traits = replace(self.traits, meets_all_clients=asks)  # type: ignore[misc]
        self.client = ClusterClient(
            self.base.client, self.choice, self.base.weighting if update == "gradient" else ""
        )

    def check_cohort(self, size: int, most: int) -> None:
        """Also refuse more clusters than clients."""
        super().check_cohort(size, most)
        check_k(self.k, most)

    def init(self, server: Server) -> State:
        """Nobody has chosen yet."""
        state = super().init(server)
        return state | ({"assignment": torch.full_like(state["assignment"], -1)} if self.k > 1 else {})

    def round(self, server: Server, state: State, round: Round) -> State:
        """Start, if that is still to come; then choice, training and averages."""
        if self.k == 1:
            found = Strategy.round(self, server, state, round)
            centres, buffers = found["w"][None].clone(), found["buffers"][None].clone()
            return self.settled(server, state, centres=centres, centre_buffers=buffers)
        cohort = list(round.cohort)
        if len(state["centres"]) == 1:
            first, lost = self._start(server, state)
            if first is None:
                return state
            state = state | {"centres": first.w, "centre_buffers": first.buffers}
            cohort = [c for c in cohort if c not in lost]
        return self._turn(server, state, self.train(server, state, cohort, choosing="fit"))

    def _turn(self, server: Server, state: State, replies: Replies) -> State:
        if not len(replies):
            return self.settled(server, state)
        picks = [int(cast(int, v)) for v in replies.values("cluster")]
        chosen = dict(zip(replies.clients, picks, strict=True))
        centres, buffers = self.averaged(server, state, replies, chosen)
        assignment = moved(state["assignment"], chosen.items())
        return self.settled(server, state, centres=centres, centre_buffers=buffers, assignment=assignment)

    def _start(self, server: Server, state: State) -> tuple[Weights | None, set[int]]:
        """The first centres, and who failed on the way to them."""
        who = starters(server, self.spread_clients)
        if self.start == "spread":
            clients, models, lost = self.spread(server, state, who, self.spread_epochs)
            return apart(server, clients, models, self.k), lost
        if self.restarts == 1:
            return self._drawn(server, 0), set()
        lost = set()
        best: tuple[float, Weights | None] = (float("inf"), None)
        with server.apart("start"):
            for attempt in range(self.restarts):
                loss, found, lost = self._short(server, state, self._drawn(server, attempt), who, lost)
                best = min(best, (loss, found), key=lambda pair: pair[0])
        return best[1], lost

    def _short(
        self, server: Server, state: State, first: Weights, who: Sequence[int], lost: set[int]
    ) -> tuple[float, Weights, set[int]]:
        """A short run from the centres ``first``: the mean loss that was chosen by in its last round, its centres, and
        who has failed so far."""
        w, b, loss = first.w, first.buffers, float("inf")
        for turn in range(SHORT):
            here, asked = state | {"centres": w, "centre_buffers": b}, [c for c in who if c not in lost]
            replies = self.train(server, here, asked, choosing="join", turns=dict.fromkeys(asked, turn))
            lost = lost | {o.client for o in replies.outcomes if o.kind in LOST}
            if not len(replies):
                return float("inf"), first, lost
            picks = [int(cast(int, v)) for v in replies.values("cluster")]
            w, b = self.averaged(server, here, replies, dict(zip(replies.clients, picks, strict=True)))
            loss = sum(cast(float, v) for v in replies.values("loss")) / len(replies)
        return loss, Weights(w, b), lost

    def _drawn(self, server: Server, attempt: int) -> Weights:
        """``k`` initial models of their own draws."""
        if server.fresh is None:
            raise ConfigError(
                "strategy.start=random: centres cannot be drawn where the initial weights are given; type "
                "strategy.start=spread"
            )
        drawn = [server.fresh(attempt * self.k + j) for j in range(self.k)]
        return Weights(torch.stack([m.w for m in drawn]), torch.stack([m.buffers for m in drawn]))
