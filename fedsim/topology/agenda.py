"""What peers without a common clock do, worked out before any of it is computed.

When a peer wakes, whom a message reaches and when a full inbox makes a peer mix never depends on the models
themselves. So a window of virtual time is planned first, from events alone, as a list of trainings and mixes with
their inputs; trainings whose inputs are known at the same stage are then one exchange, whatever their ticks.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedsim.errors import ConfigError
from fedsim.rng import numpy_rng
from fedsim.system.events import Event, EventQueue
from fedsim.topology.base import Topology
from fedsim.topology.timing import Duration


@dataclass(frozen=True)
class Rules:
    """How peers behave in time; ticks are virtual.

    ``interval``: from one local training to the next, times the peer's own factor, lognormal with ``spread`` (0: all
    alike). ``delay`` and ``loss`` of a message. ``online``: probability that a peer is reachable and works in a stretch
    of ``churn`` ticks; offline, what it is sent is lost and it wakes later with its old model. ``trigger``: a peer
    mixes when its inbox holds ``fill`` times its number of neighbours (``count``), before its own training
    (``wakeup``), or on every message at once (``receipt``). ``inbox``: ``latest`` message of each sender, or all
    (``accumulate``). ``fanout``: neighbours a model is sent to, None for all. ``nbytes``: size of a message.
    """

    interval: Duration
    delay: Duration
    spread: float
    loss: float
    online: float
    churn: float
    trigger: str
    fill: float
    inbox: str
    fanout: int | None
    nbytes: int


class Training(NamedTuple):
    """Peer ``peer`` trains for the ``turn``-th time; ``copy`` numbers the model it sends, -1 if it sends none."""

    peer: int
    turn: int
    copy: int


class Mix(NamedTuple):
    """``peer`` mixes its model with the ``copies`` in its inbox (with repetitions), at ``time``."""

    peer: int
    copies: tuple[int, ...]
    time: float


@dataclass
class Agenda:
    """Stages of a window: all trainings of a stage are ready at once; its mixes follow, in waves of distinct peers."""

    trainings: list[list[Training]] = field(default_factory=list)
    mixes: list[list[list[Mix]]] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)  # copy to the mixes of this window that read it
    sent: Counter[int] = field(default_factory=Counter)  # messages by peer
    received: Counter[int] = field(default_factory=Counter)
    lost: int = 0

    def train(self, stage: int, training: Training) -> None:
        """Into its stage; a peer trains at most once in a stage."""
        self._reach(stage)
        self.trainings[stage].append(training)

    def mix(self, stage: int, mix: Mix) -> None:
        """Into the first wave of the stage in which this peer does not mix yet."""
        self._reach(stage)
        waves = self.mixes[stage]
        wave = sum(any(m.peer == mix.peer for m in w) for w in waves)
        if wave == len(waves):
            waves.append([])
        waves[wave].append(mix)
        self.uses.update(mix.copies)

    def _reach(self, stage: int) -> None:
        while len(self.trainings) <= stage:
            self.trainings.append([])
            self.mixes.append([])


class Planner:
    """The events of all peers, up to now; ``saved()`` is plain data for a checkpoint, from which one goes on."""

    def __init__(self, topology: Topology, rules: Rules, seed: int, saved: dict[str, Any] | None = None):
        n = topology.num_peers
        self.topology, self.rules, self.seed = topology, rules, seed
        saved = saved or {}
        self.queue = EventQueue(
            saved.get("events", ()), now=saved.get("now", 0.0), sequence=saved.get("sequence", 0)
        )
        self.turns: list[int] = list(saved.get("turns", [0] * n))  # trainings done, by peer
        self.wakes: list[int] = list(saved.get("wakes", [0] * n))  # times woken, offline ones included
        self.copies: int = saved.get("copies", 0)  # models sent so far: the next one's number
        self.inboxes: list[list[tuple[int, int]]] = [
            [(int(c), int(s)) for c, s in box] for box in saved.get("inboxes", [[] for _ in range(n)])
        ]  # (copy, sender)
        self.senders: dict[int, int] = {int(c): s for c, s in saved.get("senders", {}).items()}
        self._receivers: tuple[Any, Any] | None = None
        self._there: dict[
            int, tuple[int, bool]
        ] = {}  # of every peer the last stretch asked for, and the answer
        if not saved:
            for peer in topology.present.tolist():
                self.queue.push(self._pace(peer, numpy_rng(seed, "gossip/first", peer)), "wake", peer)

    def saved(self) -> dict[str, Any]:
        """Everything that the next window depends on, as JSON-plain values."""
        live = self.live()
        return {
            "events": [list(e) for e in self.queue.items()],
            "now": self.queue.now,
            "sequence": self.queue.sequence,
            "turns": self.turns,
            "wakes": self.wakes,
            "copies": self.copies,
            "inboxes": [[list(m) for m in box] for box in self.inboxes],
            "senders": {str(c): self.senders[c] for c in sorted(live)},
        }

    def live(self) -> set[int]:
        """Copies that lie in an inbox or are under way."""
        waiting = {c for box in self.inboxes for c, _ in box}
        return waiting | {int(e.data[0]) for e in self.queue.heap if e.kind == "message"}

    def plan(self, until: float) -> Agenda:
        """All that happens up to and including tick ``until``."""
        agenda = Agenda()
        stage = [0] * self.topology.num_peers  # after which each peer's model is known; copies likewise
        known: dict[int, int] = {}
        touched: set[int] = set()
        while (event := self.queue.peek()) is not None and event.time <= until:
            if event.time > self.queue.now:
                self._full_inboxes(agenda, touched, stage, known)
            self.queue.pop()
            if event.kind == "wake":
                self._wake(agenda, event, stage, known)
            elif self._receive(agenda, event):
                if self.rules.trigger == "receipt":
                    self._mix(agenda, event.client, stage, known)
                touched.add(event.client)
        self._full_inboxes(agenda, touched, stage, known)
        live = self.live()
        self.senders = {c: s for c, s in self.senders.items() if c in live or c in agenda.uses}
        return agenda

    def _wake(self, agenda: Agenda, event: Event, stage: list[int], known: dict[int, int]) -> None:
        peer, rules = event.client, self.rules
        rng = numpy_rng(self.seed, "gossip/wake", peer, self.wakes[peer])
        self.wakes[peer] += 1
        self.queue.push(event.time + self._pace(peer, rng), "wake", peer)
        if not self._online(peer, event.time):
            return
        if rules.trigger == "wakeup":
            self._mix(agenda, peer, stage, known)
        stage[peer] += 1
        receivers = self._neighbours(peer, event.time)
        if rules.fanout is not None and rules.fanout < len(receivers):
            receivers = np.sort(rng.choice(receivers, rules.fanout, replace=False))
        copy = self.copies if len(receivers) else -1
        agenda.train(stage[peer], Training(peer, self.turns[peer], copy))
        self.turns[peer] += 1
        if copy < 0:
            return
        self.copies += 1
        self.senders[copy], known[copy] = peer, stage[peer]
        agenda.sent[peer] += len(receivers)
        kept = rng.random(len(receivers)) >= rules.loss
        delays = rules.delay(rng, peer, len(receivers), rules.nbytes)
        agenda.lost += int((~kept).sum())
        for receiver, delay in zip(receivers[kept], delays[kept], strict=True):
            self.queue.push(event.time + float(delay), "message", int(receiver), copy)

    def _receive(self, agenda: Agenda, event: Event) -> bool:
        peer, copy = event.client, int(event.data[0])
        if not self._online(peer, event.time):
            agenda.lost += 1
            return False
        agenda.received[peer] += 1
        box, sender = self.inboxes[peer], self.senders[copy]
        if self.rules.inbox == "latest":
            box[:] = [m for m in box if m[1] != sender]
        box.append((copy, sender))
        return True

    def _full_inboxes(
        self, agenda: Agenda, touched: set[int], stage: list[int], known: dict[int, int]
    ) -> None:
        """At the end of a tick: peers whose inbox is full mix."""
        if self.rules.trigger == "count" and touched:
            degrees = self.topology.degrees(math.floor(self.queue.now))
            for peer in sorted(touched):
                if len(self.inboxes[peer]) >= max(1, math.ceil(self.rules.fill * degrees[peer])):
                    self._mix(agenda, peer, stage, known)
        touched.clear()

    def _mix(self, agenda: Agenda, peer: int, stage: list[int], known: dict[int, int]) -> None:
        box = self.inboxes[peer]
        if not box:
            return
        stage[peer] = max(stage[peer], *(known.get(c, 0) for c, _ in box))
        agenda.mix(stage[peer], Mix(peer, tuple(c for c, _ in box), self.queue.now))
        box.clear()

    def _pace(self, peer: int, rng: np.random.Generator) -> float:
        factor = 1.0
        if self.rules.spread:
            draw = numpy_rng(self.seed, "gossip/speed", peer).standard_normal()
            factor = math.exp(self.rules.spread * draw)
        ticks = factor * float(self.rules.interval(rng, peer, 1, 0)[0])
        if not 0 < ticks < math.inf:
            raise ConfigError(
                f"strategy.interval: gave peer {peer} {ticks} ticks between two trainings; expected more than 0"
            )
        return ticks

    def _online(self, peer: int, time: float) -> bool:
        if self.rules.online >= 1:
            return True
        stretch = math.floor(time / self.rules.churn)
        if self._there.get(peer, (-1, False))[0] != stretch:
            draw = numpy_rng(self.seed, "gossip/online", peer, stretch).random()
            self._there[peer] = stretch, bool(draw < self.rules.online)
        return self._there[peer][1]

    def _neighbours(self, peer: int, time: float) -> np.ndarray:
        """Whom a model of ``peer`` is sent to."""
        graph = self.topology.at(math.floor(time))
        if self._receivers is None or self._receivers[0] is not graph:
            self._receivers = graph, graph.T.tocsr()
        out = self._receivers[1]
        return np.asarray(out.indices[out.indptr[peer] : out.indptr[peer + 1]])
