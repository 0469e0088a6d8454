"""Asynchronous gossip: peers without a common clock, after the tick simulation of the authors of "Vanishing Variance
Problem in Fully Decentralized Neural-Network Systems", arXiv 2404.04616."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from fedsim.exchange.payload import Outcome
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.topology.agenda import Agenda, Mix, Planner, Rules, Training
from fedsim.topology.timing import duration
from strategies import peers
from strategies.averaging import mix, variances
from strategies.base import State, check
from strategies.gossip import Peers, choose, rows_of

FIXED = (
    "strategy.mixing=metropolis: mixes of several ticks are computed together, so it needs a graph that does not "
    "change; type uniform or conservative"
)


@dataclass(kw_only=True)
class AsyncGossip(Peers):
    """Every peer trains when it wakes, sends its model to its neighbours at once, and mixes when ``trigger`` says so.

    A round is a window of ``ticks_per_round`` ticks. ``interval``, ``spread``, ``delay``, ``loss``, ``online``,
    ``churn``, ``trigger``, ``fill``, ``inbox`` and ``fanout``: see ``fedsim.topology.agenda.Rules``; durations may be a
    number or a pair (``fedsim.topology.timing.duration``). Within a tick all
    training comes before all mixing by ``count``. A peer's draws and learning rate go by how often it has trained.

    State beside that of all peers: ``copies`` (S, d), models under way or in inboxes, with their variances
    ``copy_variances`` (S, L) and statistics ``copy_buffers`` (S, b), and ``schedule``, the events to come. A peer
    whose training failed sends the model it had.
    """

    traits: ClassVar[Traits] = replace(
        Peers.traits,
        asynchronous=True,
        devices="refused",  # absence is ``online``
        unread={**Peers.traits.unread, "churn": ("online", (1,)), "fill": ("trigger", ("wakeup", "receipt"))},
    )
    ticks_per_round: float
    interval: Any
    spread: float
    delay: Any
    loss: float
    online: float
    churn: float
    trigger: str
    fill: float
    inbox: str
    fanout: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("trigger", self.trigger, ("count", "wakeup", "receipt"))
        choose("inbox", self.inbox, ("latest", "accumulate"))
        for key in ("ticks_per_round", "churn", "fill"):
            check(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        if self.mixing == "metropolis":
            self.traits = replace(self.traits, fixed_graph=FIXED)  # type: ignore[misc]
        self.pace, self.transit = duration("interval", self.interval), duration("delay", self.delay)
        check(self.spread >= 0, "spread", self.spread, "must not be negative")
        check(0 <= self.loss < 1, "loss", self.loss, "must be in [0, 1)")
        check(0 < self.online <= 1, "online", self.online, "must be in (0, 1]")
        check(
            self.fanout is None or self.fanout >= 1,
            "fanout",
            self.fanout,
            "must be at least 1, or null for all",
        )
        full = self.inbox == "accumulate" or self.fill <= 1 or self.trigger != "count"
        check(
            full,
            "fill",
            self.fill,
            "with inbox=latest an inbox never holds more than one model per neighbour",
        )

    def init(self, server: Server) -> State:
        """Nothing under way, everybody about to wake."""
        state = super().init(server)
        none = {k: state[k].new_empty((0, state[k].shape[1])) for k in ("peers", "buffers")}
        return state | {
            "copies": none["peers"],
            "copy_buffers": none["buffers"],
            "copy_variances": torch.empty((0, len(server.layout.params)), dtype=torch.float64),
            "schedule": {},
        }

    def round(self, server: Server, state: State, round: Round) -> State:
        """Plan the window, then carry it out stage by stage."""
        self.describe(server)
        assert server.topology is not None
        size = self.message_bytes(server, state)
        planner = Planner(server.topology, self._rules(size), server.seed, state["schedule"])
        until = (round.index + 1) * self.ticks_per_round
        agenda = planner.plan(until)
        work = _Window(self, server, state, agenda, planner)
        for trainings, waves in zip(agenda.trainings, agenda.mixes, strict=True):
            work.train(trainings)
            for wave in waves:
                work.mix(wave)
        _book(server, agenda, size)
        peers.note_short(server, work.short)
        server.log.update(
            {
                "ticks": until,
                "messages": float(agenda.sent.total()),
                "messages_lost": float(agenda.lost),
                "trainings": float(sum(map(len, agenda.trainings))),
                "exchanges": float(sum(map(bool, agenda.trainings))),
                "mixes": float(sum(len(w) for waves in agenda.mixes for w in waves)),
            }
        )
        return work.state()

    def _rules(self, nbytes: int) -> Rules:
        plain = set(Rules.__dataclass_fields__) - {"interval", "delay", "nbytes"}
        same = {k: getattr(self, k) for k in plain}
        return Rules(**same, interval=self.pace, delay=self.transit, nbytes=nbytes)


class _Window:
    """The models while a window is carried out: the peers' own, and copies that are still to be read."""

    def __init__(
        self, method: AsyncGossip, server: Server, state: State, agenda: Agenda, planner: Planner
    ) -> None:
        self.method, self.server, self.start, self.planner = method, server, state, planner
        self.uses, self.live = Counter(agenda.uses), planner.live()
        self.short = dict[int, str]()  # peers with too few models for the aggregator, and what it said
        self.models = {"peers": state["peers"].clone(), "buffers": state["buffers"].clone()}
        live = state["schedule"].get("senders", {})
        kept = zip(*(state[k].unbind() for k in ("copies", "copy_buffers", "copy_variances")), strict=True)
        self.copies: dict[int, tuple[Tensor, ...]] = dict(zip(map(int, live), kept, strict=True))

    def train(self, trainings: Sequence[Training]) -> None:
        """One exchange for all; then the models that are sent are copied."""
        if not trainings:
            return
        turns = {t.peer: t.turn for t in trainings}
        who = sorted(turns)
        replies = self.server.exchange(rows_of(self.models, who), self.method.fold, clients=who, turns=turns)
        if len(replies):
            self.models = peers.moved(self.models, replies, in_place=True)
        x, slots = self.models["peers"], self.server.layout.params
        senders = [t for t in trainings if self.uses[t.copy] or t.copy in self.live]
        shipped = variances(x[[t.peer for t in senders]].numpy(), slots)
        for t, variance in zip(senders, shipped, strict=True):
            self.copies[t.copy] = (
                x[t.peer].clone(),
                self.models["buffers"][t.peer].clone(),
                torch.from_numpy(variance),
            )

    def mix(self, wave: Sequence[Mix]) -> None:
        """Mix the inboxes of distinct peers: one sparse-dense product per block of columns."""
        method, server = self.method, self.server
        copies = np.concatenate([m.copies for m in wave])
        used, columns, times = np.unique(copies, return_inverse=True, return_counts=True)
        rows = np.repeat(np.arange(len(wave)), [len(m.copies) for m in wave])
        arrived = csr_array((np.ones(len(columns)), (rows, columns)), shape=(len(wave), len(used)))
        arrived.sum_duplicates()
        who = np.array([m.peer for m in wave])
        weights = method.weigh(
            server,
            arrived,
            int(wave[0].time),
            receivers=who,
            senders=np.array([self.planner.senders[c] for c in used.tolist()]),
        )
        pool, statistics, shipped = (
            torch.stack(t) for t in zip(*(self.copies[c] for c in used.tolist()), strict=True)
        )
        own = self.models["peers"][who]
        short = mix(
            own.numpy(),
            pool.numpy(),
            *weights,
            arrived,
            server.layout.params,
            method.correction,
            pool_variances=shipped.numpy(),
            rule=method.rule,
        )
        self.models["peers"][who] = own
        self.short |= {int(who[i]): why for i, why in short.items()}
        if server.share_buffers and statistics.shape[1]:
            mine = self.models["buffers"][who]
            mix(mine.numpy(), statistics.numpy(), *weights, arrived, ())
            self.models["buffers"][who] = mine
        for copy, count in zip(used.tolist(), times.tolist(), strict=True):
            self.uses[copy] -= count
            if not self.uses[copy] and copy not in self.live:
                self.copies.pop(copy, None)

    def state(self) -> State:
        """The next state: of the copies those that somebody will still read."""
        live = sorted(self.live)
        kept: State = dict(self.models)
        for i, name in enumerate(("copies", "copy_buffers", "copy_variances")):
            parts = [self.copies[c][i] for c in live]
            kept[name] = torch.stack(parts) if parts else self.start[name][:0].clone()
        return {**self.start, **kept, "schedule": self.planner.saved()}


def _book(server: Server, agenda: Agenda, size: int) -> None:
    """One outcome per peer for the whole window, with its messages' bytes, instead of one per training."""
    done: dict[int, list[Outcome]] = {c: [] for c in server.clients}
    for o in server.outcomes:
        if o.kind == "ok" and o.task == "fit":
            done[o.client].append(o)
    others = [o for o in server.outcomes if not (o.kind == "ok" and o.task == "fit")]
    server.outcomes[:] = [_merged(c, found, agenda, size) for c, found in done.items()] + others


def _merged(client: int, found: Sequence[Outcome], agenda: Agenda, size: int) -> Outcome:
    samples = sum(o.samples for o in found)
    metrics = {"trainings": float(len(found))}
    if samples:
        metrics["train_loss"] = sum(o.metrics.get("train_loss", 0.0) * o.samples for o in found) / samples
        metrics["steps"] = sum(o.metrics.get("steps", 0.0) for o in found)
    return Outcome(
        client,
        "ok",
        weight=1.0,
        metrics=metrics,
        samples=samples,
        seconds=sum(o.seconds for o in found),
        bytes_up=agenda.sent[client] * size,
        bytes_down=agenda.received[client] * size,
    )
