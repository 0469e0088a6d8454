"""What clustered methods share: a model per cluster, the clients' clusters, how both are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.clustered import ClusterClient
from fedsim.errors import TooFewUpdates
from fedsim.exchange.payload import Message, Outcome, Payload, Replies
from fedsim.rng import numpy_rng
from fedsim.server.clientmetrics import over_clients
from fedsim.server.exchanges import Server
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.vectors import Weights
from strategies.aggregators import is_mean
from strategies.base import State, check
from strategies.clusters import agreement, far_apart, of_members, sizes
from strategies.composed import Composed

LOST = ("failed", "nonfinite", "dropped")  # not asked again in the round


@dataclass(kw_only=True)
class Clustered(Composed):
    """Each cluster is averaged by itself, as FedAvg does, under the configured aggregator.

    State: ``centres`` (k, d), ``centre_buffers`` (k, b); ``assignment`` (m,), the cluster of every registered client,
    -1 of those not known; ``w`` and ``buffers``, the plain mean over centres, which is the run's ``global`` model.
    The round's row says ``clusters``, ``cluster_sizes``, ``assignment_changes``, and with domains ``ari``.
    """

    traits: ClassVar[Traits] = Traits()
    client: Any = field(init=False)
    choice: ClassVar[str]  # how a client finds its cluster, see ``ClusterClient``

    def __post_init__(self) -> None:
        self.take(type(self).traits)
        self.client = ClusterClient(self.base.client, self.choice)

    def init(self, server: Server) -> State:
        """One centre, the initial model, for everybody."""
        state = super().init(server)
        assignment = torch.full((len(server.sizes),), -1.0, dtype=torch.float64)
        assignment[list(server.clients)] = 0
        return state | {
            "centres": state["w"][None].clone(),
            "centre_buffers": state["buffers"][None].clone(),
            "assignment": assignment,
        }

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """A cluster that there is not; an update that weighs nothing, and would alone be the mean of its cluster."""
        weight = update.values.get("weight")
        if (
            "delta" in update.arrays
            and isinstance(weight, float)
            and weight < torch.finfo(torch.float32).tiny
        ):
            return f"weight={weight:g}: must be positive"
        count, cluster = len(asked.message.arrays.get("centres", ())), update.values.get("cluster")
        wrong = cluster is not None and (type(cluster) is not int or not 0 <= cluster < count)
        return f"cluster={cluster!r}: must be a number from 0 to {count - 1}" if wrong else ""

    def models(self, state: State) -> Mapping[str, Weights]:
        """``global``, the mean over centres, and with several ``cluster/<j>``."""
        centres = Weights(state["centres"], state["centre_buffers"])
        out = {"global": Weights(state["w"], state["buffers"])}
        if len(centres.w) == 1:
            return out
        return out | {f"cluster/{j}": Weights(w, b) for j, (w, b) in enumerate(zip(*centres, strict=True))}

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Means over centres of their numbers on the common test set."""
        models = list(self.models(state).values())
        found = [server.evaluate(weights) for weights in models[1:] or models]
        if len(found) == 1:
            return found[0]
        return {
            k: sum(f[k] for f in found) / len(found)
            for k, v in found[0].items()
            if isinstance(v, float | int)
        }

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Every client under its own cluster's model; clients of none choose one by their training samples."""
        if len(state["centres"]) == 1:
            return super().evaluate_clients(server, state)
        found: list[Outcome] = []
        for cluster in range(-1, len(state["centres"])):
            who = [c for c in server.clients if int(state["assignment"][c]) == cluster]
            if who:
                offered = self.offered(server, state, None if cluster < 0 else cluster)
                found += server.exchange(Message(offered), {}, task="evaluate", clients=who).ok
        found.sort(key=lambda o: o.client)
        return over_clients(found, server.sizes, server.client_domains)

    def newcomer_message(self, server: Server, state: State) -> Message:
        """For clients that never take part: one model, or all centres, to be chosen from by half of the samples."""
        if len(state["centres"]) == 1:
            return Message(self.offered(server, state, 0))
        return Message(replace_values(self.offered(server, state, None), {"halves": True}))

    def offered(self, server: Server, state: State, cluster: int | None) -> Payload:
        """The model of one cluster, or (``None``) all centres."""
        shared = server.share_buffers and state["buffers"].numel() > 0
        if cluster is not None:
            one = {"w": state["centres"][cluster]}
            return Payload(one | ({"buffers": state["centre_buffers"][cluster]} if shared else {}))
        everything = {"centres": state["centres"]}
        return Payload(everything | ({"centre_buffers": state["centre_buffers"]} if shared else {}))

    def train(
        self, server: Server, state: State, clients: Sequence[int], *, choosing: str = "", **options: Any
    ) -> Replies:
        """Local training from the own centres, single updates kept; ``choosing``: the task by which clients choose;
        further ``options`` of the exchange."""
        shared = server.share_buffers and state["buffers"].numel() > 0
        whole = len(state["centres"]) == 1 and is_mean(self.aggregator)
        kinds = ("mean", "stack") if whole else ("stack",)
        fold = {"delta": kinds} | ({"buffers": ("mean", "stack") if whole else ("stack",)} if shared else {})
        if choosing:
            message = Message(self.offered(server, state, None))
            return server.exchange(message, fold, task=choosing, clients=clients, **options)
        if len(state["centres"]) == 1:
            return server.exchange(Message(self.offered(server, state, 0)), fold, clients=clients)
        own = state["assignment"][list(clients)].long()
        rows = {"w": state["centres"][own]} | ({"buffers": state["centre_buffers"][own]} if shared else {})
        return server.exchange(Message(rows=rows), fold, clients=clients)

    def averaged(
        self, server: Server, state: State, replies: Replies, clusters: Mapping[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Centres (k, d) and statistics (k, b) after the mean update of each cluster; ``clusters`` of those that
        answered. A cluster that nobody answered for keeps its bits."""
        centres, buffers = state["centres"].clone(), state["centre_buffers"].clone()
        for j in sorted(set(clusters.values())):
            part = of_members(replies, [c for c in replies.clients if clusters[c] == j])
            place = f"cluster_{j}/delta"
            if part is not replies and place in replies.memory:
                part.memory["delta"] = replies.memory[place]
            try:
                centres[j] = state["centres"][j] + self.base.server_lr * self.aggregate(part)
            except TooFewUpdates as thin:
                server.thin(f"cluster {j}: {thin}")
                continue
            if ("buffers", "mean") in part.folded:
                buffers[j] = part.mean("buffers")
            if part is not replies and "delta" in part.memory:
                replies.memory[place] = part.memory["delta"]
            if part is not replies and "aggregator" in part.log:
                server.log.setdefault("aggregator", {})[f"cluster_{j}"] = part.log["aggregator"]
        return centres, buffers

    def settled(self, server: Server, before: State, **changed: Any) -> State:
        """The next state with what ``changed``, its mean model, and what the round's row says of clusters."""
        state = before | changed
        one = len(state["centres"]) == 1
        state["w"] = state["centres"][0].clone() if one else state["centres"].mean(0)
        many = state["centre_buffers"]
        state["buffers"] = many[0].clone() if one else many.mean(0)
        assignment, old = state["assignment"], before["assignment"]
        server.log["clusters"] = len(state["centres"])
        server.log["cluster_sizes"] = sizes(assignment, len(state["centres"]))
        server.log["assignment_changes"] = int(((assignment != old) & (old >= 0)).sum())
        server.log.update(agreement(assignment, server.client_domains))
        return state

    def spread(
        self, server: Server, state: State, who: Sequence[int], epochs: int
    ) -> tuple[list[int], Weights, set[int]]:
        """Models of ``who`` after ``epochs`` from the common start: ids and models of those that answered, and who
        failed."""
        shared = server.share_buffers and state["buffers"].numel() > 0
        arrays = {"w": state["w"]} | ({"buffers": state["buffers"]} if shared else {})
        fold = {"delta": "stack"} | ({"buffers": "stack"} if shared else {})
        with server.apart("start"):
            replies = server.exchange(
                Message(Payload(arrays, {"epochs": epochs})), fold, task="spread", clients=who
            )
        lost = {o.client for o in replies.outcomes if o.kind in LOST}
        if not len(replies):
            return [], Weights(state["centres"][:0], state["centre_buffers"][:0]), lost
        w = state["w"] + replies.stack("delta")
        b = replies.stack("buffers") if shared else state["buffers"].expand(len(w), -1)
        return replies.clients, Weights(w, b), lost


def starters(server: Server, count: int) -> list[int]:
    """Up to ``count`` clients for the start, drawn by the seed, the first of all among them."""
    everybody = list(server.clients)
    if count >= len(everybody):
        return everybody
    picked = numpy_rng(server.seed, "server/start").choice(len(everybody) - 1, count - 1, replace=False)
    return [everybody[0], *sorted(everybody[1 + i] for i in picked.tolist())]


def apart(server: Server, clients: Sequence[int], models: Weights, k: int) -> Weights | None:
    """``k`` of the models, far from each other; ``None``, and a note in the row, if there are fewer."""
    if len(clients) < k:
        server.thin(f"{len(clients)} clients answered for the start of {k} clusters")
        return None
    rows = far_apart(models.w, k)
    return Weights(models.w[rows], models.buffers[rows])


def check_k(k: int, most: int) -> None:
    """Refuse more clusters than clients."""
    check(k <= most, "k", k, f"more clusters than the {most} clients that take part")


def replace_values(payload: Payload, values: Mapping[str, Any]) -> Payload:
    """The same arrays with further values."""
    return Payload(payload.arrays, {**payload.values, **values})


def moved(assignment: Tensor, clusters: Iterable[tuple[int, int]]) -> Tensor:
    """A copy of ``assignment`` (m,) with some clients in other clusters."""
    out = assignment.clone()
    for client, cluster in clusters:
        out[client] = cluster
    return out
