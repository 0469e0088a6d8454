"""Clients under way of an asynchronous server: started at different virtual times, heard in order of their arrival.

When a client will arrive is known at its start. Its training waits until an answer is needed; then all clients under
way that have not been computed yet are, together, those who share a message in one exchange. So workers are kept
busy, and how fast they are changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Outcome, Replies
from fedsim.server.exchanges import Server
from fedsim.server.pricing import departures
from fedsim.system.clock import Clock
from fedsim.system.events import Event, EventQueue

NOBODY = {  # under way
    "events": [],
    "sequence": 0,
    "wave": -1,
    "started": [],
    "heard": False,
    "versions": {},
    "ready": {},
}
PREFIX = "flight/"
KEPT = (
    "hashes",
    "weight",
    "metrics",
    "bytes_up",
    "samples",
    "gradients",
    "forwards",
    "seconds",
    "reason",
    "kind",
)


@dataclass(frozen=True)
class Answer:
    """What arrives: the outcome, the arrays of the update, and which message (``version``, ``sent``) it answers."""

    outcome: Outcome
    arrays: Mapping[str, Tensor]
    version: int
    sent: Mapping[str, Tensor]


@dataclass
class Flight:
    """Up to ``concurrency`` clients under way, as plain values and tensors for a checkpoint.

    A *wave* are clients that got the same message; nobody is twice in one, so (wave, client) keys their draws. Where
    all who could get the message have had it and nobody is under way, a further wave begins with the same one: who
    has answered may be asked again (Nguyen et al. 2022, Algorithm 1, samples from all), unless of a wave nobody
    answered.
    """

    server: Server
    concurrency: int
    fold: Fold  # array name to "stack"
    queue: EventQueue
    wave: int = -1
    started: list[int] = field(default_factory=list)  # of this wave
    heard: bool = False  # whether one of this wave has answered
    versions: dict[int, int] = field(default_factory=dict)  # of each wave with clients under way
    sent: dict[int, Message] = field(default_factory=dict)  # of the same
    ready: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=dict)  # by client

    @staticmethod
    def of(server: Server, concurrency: int, fold: Fold, saved: Mapping[str, Any]) -> Flight:
        """Go on from the entries of a strategy's state that ``save`` made; from nothing where there are none."""
        clock = clock_of(server)
        plain = saved.get("flight", NOBODY)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            if name.startswith(PREFIX):
                _, kind, key, array = name.split("/", 3)
                tensors.setdefault(f"{kind}/{key}", {})[array] = value
        queue = EventQueue(plain["events"], now=clock.now, sequence=plain["sequence"])
        heard = bool(plain.get("heard", False))
        flight = Flight(server, concurrency, fold, queue, plain["wave"], list(plain["started"]), heard)
        flight.versions = {int(k): v for k, v in plain["versions"].items()}
        flight.sent = {wave: Message.of(tensors[f"sent/{wave}"]) for wave in flight.versions}
        flight.ready = {int(c): (v, tensors.get(f"ready/{c}", {})) for c, v in plain["ready"].items()}
        return flight

    def save(self) -> dict[str, Any]:
        """Entries for the strategy's state."""
        plain = {
            "events": [list(item) for item in self.queue.items()],
            "sequence": self.queue.sequence,
            "wave": self.wave,
            "started": self.started,
            "heard": self.heard,
            "versions": {str(k): v for k, v in self.versions.items()},
            "ready": {str(c): values for c, (values, _) in self.ready.items()},
        }
        out: dict[str, Any] = {"flight": plain}
        for wave, message in self.sent.items():
            out |= {f"{PREFIX}sent/{wave}/{k}": v for k, v in message.shared.arrays.items()}
        for client, (_, arrays) in self.ready.items():
            out |= {f"{PREFIX}ready/{client}/{k}": v for k, v in arrays.items()}
        return out

    def start(self, message: Message, version: int) -> None:
        """Send ``message`` to new clients until ``concurrency`` are under way, or nobody else is there."""
        if self.wave < 0 or self.wave not in self.versions or self.versions[self.wave] != version:
            self._next_wave(message, version)
        self._depart(message, self._found(self.wave, self.started))
        if self.heard and not len(self.queue) and (again := self._found(self.wave + 1, ())):
            self._next_wave(message, version)
            self._depart(message, again)

    def _found(self, wave: int, started: Sequence[int]) -> list[int]:
        """Clients to ask in ``wave``, of which some have ``started``: as many as are missing, if there are so many."""
        flying = {event.client for event in self.queue.heap}
        missing = self.concurrency - len(flying)
        if missing <= 0:
            return []
        return self.server.sample(missing, wave, self.queue.sequence, exclude={*flying, *started})

    def _depart(self, message: Message, clients: Sequence[int]) -> None:
        """Send ``message`` to ``clients``, as part of this wave."""
        if not clients:
            return
        clock, exchanger = clock_of(self.server), self.server.exchanger
        inquiry = exchanger.inquiry(message, self.fold, "fit", clients, self.wave)
        for d in departures(clock, exchanger, inquiry, self.server.record.exchanges):
            facts = (self.wave, d.steps, d.lost, d.seconds, d.joules, d.bytes_down, d.battery)
            self.queue.push(clock.now + d.seconds, "lost" if d.lost else "answer", d.client, *facts)
        self.started += clients

    def next(self) -> Answer | None:
        """Wait for the next answer (or loss, an outcome ``dropped``); ``None`` if nobody is under way.

        The outcome is recorded in the round, and virtual time moves to it.
        """
        if not len(self.queue):
            return None
        event = self.queue.pop()
        clock_of(self.server).move(event.time, event.data[4])
        wave, _, lost, seconds, joules, down, battery = event.data
        outcome = Outcome(event.client, "dropped", bytes_down=down if seconds else 0, reason=lost)
        arrays: dict[str, Tensor] = {}
        if event.kind == "answer":
            if event.client not in self.ready:
                self._compute(event)
            values, arrays = self.ready.pop(event.client)
            outcome = replace(outcome, **values)
        outcome = replace(outcome, sim_seconds=seconds, joules=joules, battery=battery)
        self.server.record.begins.append(len(self.server.outcomes))
        self.server.outcomes.append(outcome)
        self.heard |= outcome.kind == "ok" and wave == self.wave
        answer = Answer(outcome, arrays, self.versions[wave], self.sent[wave].shared.arrays)
        self._forget()
        return answer

    def idle(self) -> None:
        """Nobody is under way and nobody could be started: time passes, and everybody may be asked again."""
        clock = clock_of(self.server)
        self.server.log["idle_seconds"] = clock.system.idle
        clock.move(clock.now + clock.system.idle)
        self.queue.now = clock.now
        self.versions.pop(self.wave, None)
        self.sent.pop(self.wave, None)

    def _next_wave(self, message: Message, version: int) -> None:
        self.wave += 1
        self.started, self.heard = [], False
        self.versions[self.wave], self.sent[self.wave] = version, message
        self._forget()

    def _forget(self) -> None:
        """Drop the messages of past waves that nobody under way has to answer."""
        needed = {event.data[0] for event in self.queue.heap} | {self.wave}
        for wave in set(self.versions) - needed:
            del self.versions[wave], self.sent[wave]

    def _compute(self, first: Event) -> None:
        """Train all clients under way that have not been, wave by wave."""
        todo: dict[int, dict[int, int]] = {}
        for event in (first, *self.queue.heap):
            if event.kind == "answer" and event.client not in self.ready:
                todo.setdefault(event.data[0], {})[event.client] = event.data[1]
        for wave, steps in sorted(todo.items()):
            replies = self._train(wave, dict(sorted(steps.items())))
            stacks = {name: replies.stack(name) for name in self.fold} if len(replies) else {}
            rows = {client: i for i, client in enumerate(replies.clients)}
            for o in replies.outcomes:
                arrays = {k: v[rows[o.client]].clone() for k, v in stacks.items()} if o.client in rows else {}
                facts = asdict(replace(o, values={}))
                self.ready[o.client] = {k: facts[k] for k in KEPT}, arrays

    def _train(self, wave: int, steps: Mapping[int, int]) -> Replies:
        """The updates of clients of one wave, ``steps`` local steps each; time and the round's log stay as they are."""
        exchanger = self.server.exchanger
        inquiry = exchanger.inquiry(self.sent[wave], self.fold, "fit", list(steps), wave)
        inquiry = replace(inquiry, works={c: work.only(steps[c]) for c, work in inquiry.works.items()})
        outcomes, folded = exchanger.run(inquiry, self.server.round.index)
        clock_of(self.server).learn(inquiry.kind, outcomes, inquiry.works)
        return Replies(outcomes, folded)


def clock_of(server: Server) -> Clock:
    """The virtual clock, without which there is no order of arrivals."""
    if server.clock is None:
        raise ConfigError(
            "strategy: an asynchronous method needs devices that take different times; add system=lognormal "
            "or another system"
        )
    return server.clock
