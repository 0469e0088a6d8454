"""An asynchronous server on the virtual clock: what FedAsync and FedBuff share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from clients.base import Client
from fedsim.exchange.fold import Fold
from fedsim.server.exchanges import Server
from fedsim.server.flight import PREFIX, Answer, Flight
from fedsim.server.handed import Handed, as_message, as_state
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, Strategy, check

STALENESS = ("constant", "polynomial", "hinge")


@dataclass(kw_only=True)
class Asynchronous(Strategy):
    """Keeps ``concurrency`` clients under way; each that answers makes room for another, who gets the newest model.

    A round ends after ``answers`` answers. ``staleness``: weight ``s(tau)`` of an answer to a model ``tau`` versions
    old (Xie et al. 2019, section 5.2): ``constant`` 1; ``polynomial`` ``(1 + tau)^-a``; ``hinge`` 1 up to ``b``, then
    ``1 / (a (tau - b) + 1)``.
    """

    traits: ClassVar[Traits] = Traits(
        asynchronous=True,
        devices="needed",
        over_selection=False,
        unread={"a": ("staleness", ("constant",)), "b": ("staleness", ("constant", "polynomial"))},
    )
    fold: ClassVar[Fold] = {"delta": "stack"}
    concurrency: int
    staleness: str
    a: float
    b: float
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        check(self.concurrency >= 1, "concurrency", self.concurrency, "must be at least 1")
        check(
            self.staleness in STALENESS, "staleness", self.staleness, f"choose one of {', '.join(STALENESS)}"
        )
        check(self.a >= 0, "a", self.a, "must not be negative")
        check(self.b >= 0, "b", self.b, "must not be negative")

    @property
    def answers(self) -> int:
        """Answers that make a round."""
        raise NotImplementedError(f"{type(self).__name__} must define answers")

    def absorb(self, state: State, answer: Answer) -> State:
        """The next state after one answer."""
        raise NotImplementedError(f"{type(self).__name__} must define absorb(state, answer)")

    def scale(self, tau: int) -> float:
        """``s(tau)``."""
        if self.staleness == "constant":
            return 1.0
        if self.staleness == "polynomial":
            return float((1 + tau) ** -self.a)
        return 1.0 if tau <= self.b else float(1 / (self.a * (tau - self.b) + 1))

    def init(self, server: Server) -> State:
        """The model, its ``version``, and nobody under way."""
        return super().init(server) | {"version": 0}

    def round(self, server: Server, state: State, round: Round) -> State:
        """Hear ``answers`` clients in order of arrival, starting others in their place."""
        shared = server.share_buffers and len(state["buffers"]) > 0
        fold = {**self.fold, **({"buffers": "stack"} if shared else {})}
        flight = Flight.of(server, self.concurrency, fold, state)
        heard, staleness = 0, 0
        while heard < self.answers:
            flight.start(as_message(self, self.message(state, round)), state["version"])
            answer = flight.next()
            if answer is None:
                flight.idle()
                break
            if answer.outcome.kind == "ok":
                heard += 1
                staleness += state["version"] - answer.version
                given = Handed(self, state=state, sent=answer.sent)
                state = as_state(self, "absorb", self.absorb(state, answer), state)
                given.check("absorb")
        if heard:
            server.log["staleness"] = staleness / heard
        kept = {k: v for k, v in state.items() if k != "flight" and not k.startswith(PREFIX)}
        return kept | flight.save()
