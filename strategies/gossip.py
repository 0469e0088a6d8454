"""Gossip learning with variance-corrected averaging. "Vanishing Variance Problem in Fully Decentralized Neural-Network
Systems", arXiv 2404.04616. With ``averaging=plain`` gossip FedAvg; with ``order=simultaneous`` too, D-PSGD: Lian,
Zhang, Zhang, Hsieh, Zhang, Liu: Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for
Decentralized Parallel Stochastic Gradient Descent, NeurIPS 2017 (Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from scipy.sparse import csr_array
from torch import Tensor

from clients.base import Client
from clients.peer import PeerClient
from fedsim.errors import ConfigError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights
from fedsim.topology.links import arrivals
from fedsim.topology.mixing import SCHEMES, Mixing, mixing
from strategies import peers
from strategies.aggregators import Aggregator, check_enough, check_options, is_mean
from strategies.averaging import Correction, mix, variance_corrected_average, variances
from strategies.base import State, Strategy, check

__all__ = ["Gossip", "variance_corrected_average"]

ORDERS = ("train_then_mix", "mix_then_train", "simultaneous")
AVERAGING = ("variance_corrected", "plain")
UNDIRECTED = "strategy.mixing=metropolis: needs an undirected graph; type uniform or conservative"
HOSTILE = (
    "under strategy.target={} one hostile model would set the variance of a mix; type strategy.target=self or "
    "strategy.averaging=plain with it"
)
DIRECTIONS = ("push", "pull", "push_pull")


@dataclass(kw_only=True)
class Peers(Strategy):
    """What peers on a graph have in common, whatever their time: start, averaging, measurement.

    State: ``peers`` (N, d), a model per peer, ``buffers`` (N, b), and ``start`` (L,), the variance of every parameter
    tensor at the start, mean over peers. ``init``: ``independent`` draws a model per peer, ``shared`` starts all from
    one. ``averaging``, ``target``, ``scope``, ``eps``, ``strength``: see ``strategies.averaging.Correction``.
    ``mixing``: see ``fedsim.topology.mixing``; ``own_weight`` is conservative mixing's. ``momentum``: ``keep`` or
    ``reset`` at mixing. ``bn_stats``: ``local``, ``average`` or ``all_local``; None: as the run's ``buffers``.
    ``evaluate_peers``: how many are measured, None for all.
    """

    init_models: str
    averaging: str
    target: str
    scope: str
    eps: float
    strength: float
    mixing: str
    own_weight: float | None
    momentum: str
    bn_stats: str | None
    evaluate_peers: int | None
    client: Client = field(init=False)
    traits: ClassVar[Traits] = Traits(
        peers=True,
        unread=dict.fromkeys(("target", "scope", "eps", "strength"), ("averaging", ("plain",))),
    )
    fold: ClassVar[Fold] = {"delta": "stack"}

    def __post_init__(self) -> None:
        choose("init_models", self.init_models, ("independent", "shared"))
        choose("averaging", self.averaging, AVERAGING)
        choose("mixing", self.mixing, SCHEMES)
        choose("momentum", self.momentum, ("keep", "reset"))
        if self.bn_stats is not None:
            choose("bn_stats", self.bn_stats, ("local", "average", "all_local"))
        conservative = self.mixing == "conservative"
        check(
            self.own_weight is None or (conservative and 0 <= self.own_weight <= 1),
            "own_weight",
            self.own_weight,
            "must be in [0, 1]" if conservative else f"mixing={self.mixing} sets it; leave it null",
        )
        most = self.evaluate_peers
        check(most is None or most >= 1, "evaluate_peers", most, "must be at least 1, or null for all")
        try:
            correction = Correction(self.target, self.scope, self.eps, self.strength)
        except ValueError as e:
            raise ConfigError(f"strategy.{e}") from None
        self.correction = correction if self.averaging == "variance_corrected" else None
        self.client = PeerClient(keep_momentum=self.momentum == "keep")
        one_sided = self.correction is not None and self.target != "self"
        self.traits = replace(  # type: ignore[misc]
            self.traits,
            buffers=self.bn_stats,
            mean_only=HOSTILE.format(self.target) if one_sided else "",
            undirected=UNDIRECTED if self.mixing == "metropolis" else "",
        )

    def check_cohort(self, size: int, most: int) -> None:
        """Peers aggregate what their neighbours send: see ``init``, where the graph is known."""
        check_options(self.aggregator)

    def most_weight(self, asked: ClientQuestion) -> float:
        """Peers weigh 1."""
        return 1.0 if asked.task == "fit" else super().most_weight(asked)

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a ``scope`` that fits no tensor; under ``matrices`` a model that has none is mixed plainly."""
        correction = self.correction
        if (
            correction is not None
            and self.scope != "matrices"
            and not any(correction.covers(s.name, s.shape) for s in layout.params)
        ):
            names = ", ".join(s.name for s in layout.params[:4])
            raise ConfigError(
                f"strategy.scope={self.scope}: fits no tensor of the model ({names}, ...); give matrices, all, or a "
                "regular expression on their names"
            )

    def init(self, server: Server) -> State:
        """Every peer's first model."""
        topology = server.topology
        assert topology is not None
        if self.rule is not None and topology.fixed:
            least = int(topology.degrees()[topology.present].min())
            given = f"topology: the peer with the fewest neighbours, {least},"
            check_enough(self.rule, least, given, lambda n: f"a topology of degree {n}")
        models = peers.first_models(server, self.init_models)
        state: State = {"peers": models.w, "buffers": models.buffers}
        if topology.absent:
            state["there"] = torch.from_numpy(topology.present)
        start = variances(peers.those_there(state, "peers").numpy(), server.layout.params).mean(axis=0)
        return state | {"start": torch.tensor(start).to(models.w)}

    @property
    def rule(self) -> Aggregator | None:
        """The rule by which received models are aggregated, if it is not the weighted mean."""
        return None if is_mean(self.aggregator) else self.aggregator

    def models(self, state: State) -> Mapping[str, Weights]:
        """``global``, the mean over peers, and ``peers``, all of them (N, d)."""
        mean = [peers.network_mean(peers.those_there(state, k)) for k in ("peers", "buffers")]
        return {"global": Weights(*mean), "peers": Weights(state["peers"], state["buffers"])}

    def evaluate(self, server: Server, state: State) -> dict[str, float]:
        """Peers' own models on the common test set, the network's mean model, and how far apart peers are."""
        out: dict[str, float] = {}
        if server.test_size:
            some = peers.chosen(server, self.evaluate_peers)
            found = server.exchange(rows_of(state, some), {}, task="test", clients=some)
            out = peers.spread(server, found)
            out |= {f"mean_model/{k}": v for k, v in server.evaluate(self.models(state)["global"]).items()}
        if server.measured_on:
            return out  # where peers are hangs on no samples
        there = peers.those_there(state, "peers").numpy()
        return out | peers.geometry(there, state["start"].numpy(), server.layout)

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Peers' own models on their own test samples."""
        everybody = server.clients
        found = server.exchange(rows_of(state, everybody), {}, task="evaluate", clients=everybody)
        return peers.spread(server, found, server.client_domains)

    def weigh(self, server: Server, arrived: csr_array, t: int, **who: Any) -> Mixing:
        """Mixing weights over the messages ``arrived`` (k, S) at time t."""
        assert server.topology is not None
        own = 0.5 if self.own_weight is None else self.own_weight
        degrees = server.topology.degrees(t)
        return mixing(self.mixing, arrived, own_weight=own, degrees=degrees, sizes=server.sizes, **who)

    def describe(self, server: Server) -> None:
        """Facts of the graph, once, for the summary."""
        if "topology" not in server.facts:
            assert server.topology is not None
            graph = server.topology.at(0)
            server.facts["topology"] = peers.facts(server.topology, self.weigh(server, graph, 0))

    def message_bytes(self, server: Server, state: State) -> int:
        """Bytes of a model in a message: parameters, mixed statistics, one float32 per corrected tensor."""
        slots, c = server.layout.params, self.correction
        shipped = sum(c.covers(s.name, s.shape) for s in slots) if c else 0
        statistics = server.layout.buffer_size * server.share_buffers
        return int((server.layout.size + statistics) * state["peers"].element_size() + 4 * shipped)


@dataclass(kw_only=True)
class Gossip(Peers):
    """Synchronous gossip. In a round every peer online (the cohort) trains, sends its model to its neighbours online
    and mixes what arrived with its own. All read the same snapshot.

    ``order``: ``train_then_mix``; ``mix_then_train``; ``simultaneous``, ``w_i <- sum_j W_ij w_j + (change of w_i by
    local training)``. ``fanout``: neighbours each peer talks to, drawn anew every round, None for all; ``direction``:
    the peer that draws sends (``push``), asks (``pull``) or does both. ``loss``: probability that a message is lost.

    On devices (``server.clock``) a peer takes the time of its training and of what it sends and receives over its own
    link, and the round that of the slowest. Who is lost or late neither sends nor receives.
    """

    traits: ClassVar[Traits] = replace(
        Peers.traits, unread={**Peers.traits.unread, "direction": ("fanout", (None,))}
    )
    order: str
    fanout: int | None
    direction: str
    loss: float

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("order", self.order, ORDERS)
        choose("direction", self.direction, DIRECTIONS)
        check(
            self.fanout is None or self.fanout >= 1,
            "fanout",
            self.fanout,
            "must be at least 1, or null for all",
        )
        check(0 <= self.loss < 1, "loss", self.loss, "must be in [0, 1)")

    def round(self, server: Server, state: State, round: Round) -> State:
        """Train and mix, in the configured order. Who fails to train neither sends nor receives, unless mixing came
        first."""
        self.describe(server)
        cohort, start = list(round.cohort), state
        if round.index == 0 and round.wanted is not None and round.wanted < round.num_clients:
            warnings.warn(
                f"{round.wanted} of {round.num_clients} peers are online in a round (clients_per_round); "
                f"for all type clients_per_round={round.num_clients}",
                stacklevel=2,
            )
        size = self.message_bytes(server, state)
        sent, arrived = self.messages(server, round, cohort)
        if self.order == "mix_then_train":
            state = self.mixed(server, state, round, arrived)
        planned = peers.traffic(sent, arrived, size)
        replies = server.exchange(rows_of(state, cohort), self.fold, traffic=planned)
        if not len(replies):
            return start
        if self.order != "mix_then_train" and len(replies) < len(cohort):
            sent, arrived = self.messages(server, round, replies.clients)
            peers.traffic(sent, arrived, size).book(o for o in server.outcomes if o.task == "fit")
        if self.order == "simultaneous":
            state = self.mixed(server, state, round, arrived)
        state = peers.moved(state, replies, in_place=self.order != "train_then_mix")
        if self.order == "train_then_mix":
            state = self.mixed(server, state, round, arrived, in_place=True)
        server.log["messages"] = float(sent.sum())
        return state

    def mixed(
        self, server: Server, state: State, round: Round, arrived: csr_array, *, in_place: bool = False
    ) -> State:
        """The state after one mix of the messages ``arrived``. ``in_place``: the models may be overwritten."""
        weights = self.weigh(server, arrived, round.index)
        models = state["peers"] if in_place else state["peers"].clone()
        x, slots = models.numpy(), server.layout.params
        short = mix(x, x, *weights, arrived, slots, self.correction, rule=self.rule)
        peers.note_short(server, short)
        new: State = {**state, "peers": models}
        if server.share_buffers and state["buffers"].shape[1]:
            statistics = state["buffers"].clone()
            mix(statistics.numpy(), statistics.numpy(), *weights, arrived, ())
            new["buffers"] = statistics
        return new

    def messages(self, server: Server, round: Round, online: Sequence[int]) -> tuple[csr_array, csr_array]:
        """What the peers ``online`` send in this round, and what of it arrives (see ``arrivals``)."""
        assert server.topology is not None
        graph, rng = server.topology.at(round.index), round.numpy_rng("messages")
        return arrivals(graph, online, rng, fanout=self.fanout, direction=self.direction, loss=self.loss)


def rows_of(state: State, who: Sequence[int]) -> Message:
    """Each of the peers ``who`` (ascending) receives its own model."""
    everybody = len(who) == len(state["peers"])
    index = None if everybody else torch.tensor(list(who), dtype=torch.long)
    rows: dict[str, Tensor] = {"w": state["peers"], "buffers": state["buffers"]}
    return Message.of(rows={k: v if index is None else v[index] for k, v in rows.items() if v.shape[1]})


def choose(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is none of ``allowed``."""
    check(value in allowed, key, value, f"choose one of {', '.join(allowed)}")
