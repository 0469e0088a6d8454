"""FedBuff. Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered Asynchronous
Aggregation, AISTATS 2022 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.sgd import SGDClient
from fedsim.server.exchanges import Server
from fedsim.server.flight import Answer
from strategies.aggregators import check_enough, remembers
from strategies.asynchronous import Asynchronous
from strategies.base import State, check, check_weighting


@dataclass(kw_only=True)
class FedBuff(Asynchronous):
    """Every ``buffer`` answers: ``x <- x + server_lr mean(s(tau_i) delta_i)``; a round is one such step.

    ``weighting``: ``uniform`` (the paper) or by ``samples``. Any aggregator takes the place of the mean, on the scaled
    updates. Fewer clients than ``buffer`` are asked again; part of a buffer waits for the next round where nobody could
    be started, or nobody of all who were answered.
    """

    buffer: int
    server_lr: float
    weighting: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.buffer >= 1, "buffer", self.buffer, "must be at least 1")
        check(self.server_lr > 0, "server_lr", self.server_lr, "must be positive")
        check_weighting(self.weighting)
        self.client = SGDClient(weighting=self.weighting)

    def init(self, server: Server) -> State:
        """Adds the empty buffer: scaled updates ``held`` (n, d), and their weights."""
        state = super().init(server)
        held = {"held": state["w"].new_zeros((0, len(state["w"]))), "weights": []}
        return state | held | {"held_buffers": state["buffers"].new_zeros((0, len(state["buffers"])))}

    def check_cohort(self, size: int, most: int) -> None:
        """What the aggregator gets is a full buffer, whoever the answers are of."""
        given = "strategy.buffer={}".format
        check_enough(self.aggregator, self.buffer, given(self.buffer), given)

    @property
    def answers(self) -> int:
        """One step of the server."""
        return self.buffer

    def absorb(self, state: State, answer: Answer) -> State:
        """Buffer the answer; with a full buffer, step."""
        scaled = answer.arrays["delta"] * self.scale(state["version"] - answer.version)
        state = state | {
            "held": torch.cat([state["held"], scaled[None]]),
            "weights": [*state["weights"], answer.outcome.weight],
        }
        if "buffers" in answer.arrays:
            state["held_buffers"] = torch.cat([state["held_buffers"], answer.arrays["buffers"][None]])
        if len(state["held"]) < self.buffer:
            return state
        weights = torch.tensor(state["weights"], dtype=torch.float64)
        centre = {"centre": state.get("centre")} if remembers(self.aggregator) else {}
        step = self.aggregator(state["held"], weights, **centre)
        out = state | ({"centre": step} if centre else {})
        out |= {
            "w": state["w"] + self.server_lr * step,
            "version": state["version"] + 1,
            "held": state["held"][:0],
            "weights": [],
        }
        if "buffers" in answer.arrays:
            share = (weights / weights.sum()).to(state["buffers"].dtype)
            out |= {"buffers": share @ state["held_buffers"], "held_buffers": state["held_buffers"][:0]}
        return out
