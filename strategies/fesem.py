"""FeSEM. Long, Xie, Shen, Zhou, Wang, Jiang: Multi-center Federated Learning: Clients Clustering for Better
Personalization, World Wide Web 2023."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.clustered import Clustered, apart, check_k, moved, starters
from strategies.clusters import nearest


def fesem_step(models: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters (n,) of ``models`` (n, d), each of the nearest centre, and the new ``centres`` (k, d), their means; one
    without members stays."""
    picks, out = nearest(models, centres), centres.clone()
    for j in range(len(centres)):
        if len(members := models[picks == j]):
            out[j] = centres[j] + (members - centres[j]).sum(0) / len(members)
    return picks, out


@dataclass(kw_only=True)
class FeSEM(Clustered):
    """Clients train from their cluster's centre; each belongs where its last uploaded model is nearest,
    ``argmin_j |w_i - c_j|^2``, and a centre is the mean of its members' models.

    The first centres are k models far from each other among those of up to ``spread_clients`` clients after
    ``spread_epochs`` (as IFCA's ``start=spread``); a client that was not there trains once from every centre.
    ``remember``: ``model``, the last model of every client seen (m, d), in memory and in checkpoints; ``distance``, its
    cluster alone: only those that take part move, and centres are means over them. ``k=1`` with everybody is FedAvg.
    """

    traits: ClassVar[Traits] = Traits(
        mean_only="FeSEM's centres are means of models; leave aggregator out",
        discloses="FeSEM looks at single updates to find clusters, and only sums are private; type strategy=fedavg",
    )
    choice: ClassVar[str] = "distance"
    k: int
    remember: str
    spread_clients: int
    spread_epochs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.k >= 1, "k", self.k, "at least one cluster")
        check(
            self.remember in ("model", "distance"), "remember", self.remember, "choose one of model, distance"
        )
        check(self.spread_epochs >= 1, "spread_epochs", self.spread_epochs, "must be at least 1")
        enough = self.spread_clients >= self.k
        check(enough, "spread_clients", self.spread_clients, f"fewer than the {self.k} clusters to start")
        base = self.base
        check(
            base.server_lr == 1,
            "base.server_lr",
            base.server_lr,
            "centres are means of models; leave it at 1",
        )
        uniform = base.weighting == "uniform"
        check(uniform, "base.weighting", base.weighting, "members of a cluster weigh the same; type uniform")
        self.traits = replace(self.traits, meets_all_clients=self.k > 1)  # type: ignore[misc]

    def check_cohort(self, size: int, most: int) -> None:
        """Also refuse more clusters than clients."""
        super().check_cohort(size, most)
        check_k(self.k, most)

    def init(self, server: Server) -> State:
        """Nobody has sent a model yet."""
        state = super().init(server)
        if self.k > 1:
            state["assignment"] = torch.full_like(state["assignment"], -1)
        if self.remember == "model":
            m = len(server.sizes)
            state["models"] = state["w"].new_zeros(m, len(state["w"]))
            state["model_buffers"] = state["buffers"].new_zeros(m, len(state["buffers"]))
            state["seen"] = torch.zeros(m, dtype=torch.float64)
        return state

    def round(self, server: Server, state: State, round: Round) -> State:
        """Start, if that is still to come; training from the own centres; assignment; means."""
        before, cohort = state, list(round.cohort)
        if len(state["centres"]) < self.k:
            clients, models, lost = self.spread(
                server, state, starters(server, self.spread_clients), self.spread_epochs
            )
            if (first := apart(server, clients, models, self.k)) is None:
                return state
            state = state | {"centres": first.w, "centre_buffers": first.buffers}
            state["assignment"] = moved(
                state["assignment"], zip(clients, nearest(models.w, first.w).tolist(), strict=True)
            )
            state = self._noted(state, clients, models.w, models.buffers)
            cohort = [c for c in cohort if c not in lost]
        known = [c for c in cohort if state["assignment"][c] >= 0]
        strangers = [c for c in cohort if state["assignment"][c] < 0]
        found = [self.train(server, state, known)] if known else []
        if strangers:
            found.append(self.train(server, state, strangers, choosing="join"))
        if not any(len(r) for r in found):
            return self.settled(server, before, **state)
        return self._averaged(server, before, state, found)

    def _averaged(self, server: Server, before: State, state: State, found: list[Replies]) -> State:
        """Assignment of everybody whose model is at hand, and the means that follow."""
        centres, trained = state["centres"], dict[int, tuple[Tensor, Tensor | None]]()
        for replies in found:
            trained |= self._models(state, replies)
        clients = sorted(trained)
        w = torch.stack([trained[c][0] for c in clients])
        own = [trained[c][1] for c in clients]
        b = state["buffers"].expand(len(w), -1) if own[0] is None else torch.stack(cast(list[Tensor], own))
        state = self._noted(state, clients, w, b)
        if self.remember == "model":
            clients = torch.nonzero(state["seen"]).flatten().tolist()
            w, b = state["models"][clients], state["model_buffers"][clients]
        if self.k == 1 and len(found) == 1 and len(found[0]) == len(clients):  # FedAvg, to the last bit
            centres, buffers = self.averaged(server, state, found[0], dict.fromkeys(clients, 0))
            return self.settled(server, before, **state | {"centres": centres, "centre_buffers": buffers})
        picks, centres = fesem_step(w, centres)
        buffers = state["centre_buffers"].clone()
        for j in range(self.k):
            if own[0] is not None and (picks == j).any():
                buffers[j] = b[picks == j].mean(0)
        assignment = moved(state["assignment"], zip(clients, picks.tolist(), strict=True))
        new = {"centres": centres, "centre_buffers": buffers, "assignment": assignment}
        return self.settled(server, before, **state | new)

    def _models(self, state: State, replies: Replies) -> Mapping[int, tuple[Tensor, Tensor | None]]:
        """Model and statistics after training, of those that answered."""
        if not len(replies):
            return {}
        own = (
            replies.values("cluster")
            if "cluster" in replies.ok[0].values
            else state["assignment"][replies.clients]
        )
        start = state["centres"][torch.as_tensor(own).long()]
        w = start + replies.stack("delta")
        there = ("buffers", "stack") in replies.folded
        b = list(replies.stack("buffers")) if there else [None] * len(w)
        return {c: (w[i], b[i]) for i, c in enumerate(replies.clients)}

    def _noted(self, state: State, clients: list[int], w: Tensor, b: Tensor) -> State:
        """The state with the last models of ``clients``."""
        if self.remember != "model":
            return state
        who = torch.tensor(clients)
        return state | {
            "models": state["models"].index_copy(0, who, w),
            "model_buffers": state["model_buffers"].index_copy(0, who, b),
            "seen": state["seen"].index_fill(0, who, 1.0),
        }
