"""FedAvg with weights that follow from the clients' losses: what agnostic FL, q-FedAvg and TERM share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from clients.around import WeighedClient
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion
from strategies.base import State, check, check_weighting
from strategies.composed import Composed


def shifted_powers(exponents: Sequence[float]) -> Tensor:
    """``2 ** e`` (n,), float64, all times the one power of two by which the largest lies in [1, 2).

    Nothing overflows, and since a power of two changes no bit of a quotient, the ratio of two weights, and the mean
    that is taken with them, hang on nobody else.
    """
    whole = [math.floor(e) for e in exponents]
    most = max(whole, default=0)
    values = [math.ldexp(2.0 ** (e - f), f - most) for e, f in zip(exponents, whole, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def clipped(losses: Sequence[float], multiple: float | None) -> list[float]:
    """Losses of a cohort, none above ``multiple`` of their median: no single client takes the round over."""
    if multiple is None or not losses:
        return list(losses)
    most = multiple * median(losses)
    return [min(loss, most) for loss in losses]


@dataclass(frozen=True)
class Answers:
    """What a cohort said of its losses: ids (ascending), losses F_k, and what each weighs by itself (n,)."""

    clients: Sequence[int]
    losses: Sequence[float]
    sizes: Sequence[float]


@dataclass(kw_only=True)
class LossWeighted(Composed):
    """A round: clients measure the received model on all their training samples and send that loss, the server gives
    everybody a weight, clients train and are averaged with it.

    The model goes down once (the second message stands on the first); the loss costs a forward pass over all samples.
    ``clip_loss``: no loss counts for more than this multiple of the cohort's median.
    """

    weighting: str
    clip_loss: float | None
    client: Any = field(init=False)
    wants_norms = False  # whether ``apply`` needs the squared lengths of the updates

    def __post_init__(self) -> None:
        check(self.clip_loss is None or self.clip_loss > 0, "clip_loss", self.clip_loss, "must be positive")
        self.take(type(self).traits)
        check_weighting(self.weighting)
        same = self.base.weighting == self.weighting
        check(same, "base.weighting", self.base.weighting, "has no say here; leave it out")
        self.client = WeighedClient(self.base.client, self.size)

    @property
    def size(self) -> str:
        """What clients weigh by themselves: ``samples`` or ``uniform``."""
        return self.weighting

    @property
    def is_fedavg(self) -> bool:
        """Whether the options mean FedAvg: nobody is asked for losses then."""
        raise NotImplementedError(f"{type(self).__name__} must define is_fedavg")

    def most_weight(self, asked: ClientQuestion) -> float:
        """What the server told it to weigh, once it did."""
        given = asked.message.arrays.get("weight")
        if given is not None:
            return float(given)
        return 1.0 if asked.task == "fit" and self.size == "uniform" else max(asked.samples, 1.0)

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Another weight than it was told; a size or length that is negative, a size of more samples than there are."""
        size, norm2 = update.values.get("size", 0.0), update.values.get("norm2", 0.0)
        most = max(asked.samples, 1.0) if self.size == "samples" else 1.0
        given = asked.message.arrays.get("weight")
        if given is not None and update.values.get("weight") != float(given):
            return f"weight={update.values.get('weight')!r}: it was told to weigh {float(given)}"
        if not 0 <= cast(float, size) <= most:
            return f"size={size!r}: must lie between 0 and {most:g}"
        return f"norm2={norm2!r}: must not be negative" if cast(float, norm2) < 0 else ""

    def weigh(self, server: Server, state: State, answers: Answers) -> Tensor:
        """Weights (n,) >= 0 of the clients that answered; only their ratios matter."""
        raise NotImplementedError(f"{type(self).__name__} must define weigh(server, state, answers)")

    def apply(self, state: State, replies: Replies, round: Round, server: Server, answers: Answers) -> State:
        """The next state; ``answers`` are of the clients that trained. No replies: nobody weighs anything."""
        return self.update(state, replies, round) if len(replies) else state

    def round(self, server: Server, state: State, round: Round) -> State:
        """Losses, then training."""
        if self.is_fedavg:
            return super().round(server, state, round)
        names = ("w", "buffers") if server.share_buffers and len(state["buffers"]) else ("w",)
        sent = Payload({k: state[k] for k in names})
        asked = server.exchange(Message(sent, keep=True), {}, task="training_loss")
        if not len(asked):
            return state
        losses = clipped([cast(float, v) for v in asked.values("loss")], self.clip_loss)
        answers = Answers(asked.clients, losses, [cast(float, v) for v in asked.values("size")])
        weights = self.weigh(server, state, answers)
        if not float(weights.sum()) > 0:
            return self.apply(state, Replies([], {}), round, server, answers)
        share = weights / weights.sum()
        server.log["effective_clients"] = float(1 / share.square().sum())
        message = Message(
            Payload({}, {"norms": True} if self.wants_norms else {}), standing=sent, rows={"weight": weights}
        )
        averaged = {"buffers": "mean"} if "buffers" in names else {}
        replies = server.exchange(message, {**self.folds, **averaged}, clients=asked.clients)
        if not len(replies):
            return state
        trained = set(replies.clients)
        kept = [i for i, c in enumerate(answers.clients) if c in trained]
        answers = Answers(*([part[i] for i in kept] for part in vars(answers).values()))
        if not float(replies.weights.sum()) > 0:
            return self.apply(state, Replies([], {}), round, server, answers)
        state = self.apply(state, replies, round, server, answers)
        return state | ({"buffers": replies.mean("buffers")} if averaged else {})
