"""The server half of a method: state in, state out."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from clients.base import Client
from fedsim.errors import ConfigError
from fedsim.evaluation import over_clients
from fedsim.fold import Fold, fold_kinds
from fedsim.payload import Message, Replies
from fedsim.server import Round, Server
from fedsim.task import Task
from fedsim.vectors import Layout, Weights
from strategies.aggregators import Aggregator, is_mean, mean

State = dict[
    str, Any
]  # tensors and plain values: all that a checkpoint needs; nothing else is kept between rounds


class Strategy:
    """Base of all methods: one exchange a round, the aggregate of ``delta`` handed to ``update``.

    A subclass sets ``client`` and overrides ``update`` (and ``init``, ``message`` where it keeps or sends more). One
    with several exchanges a round, or none, overrides ``round``.
    """

    client: Client = Client()
    buffers: ClassVar[str | None] = None  # the method's own BatchNorm policy, instead of the configured one
    pooled: ClassVar[bool] = False  # whether all data lie in one place
    aggregator: Aggregator = staticmethod(mean)
    fold: ClassVar[Fold] = {"delta": "mean"}

    def setup(self, task: Task, layout: Layout) -> None:
        """Once per run, before the first round or the resumed one: find what is needed in the model."""

    def init(self, server: Server) -> State:
        """State before round 0: the model ``w`` (d,) and its ``buffers`` (b,)."""
        return dict(server.initial()._asdict())

    def message(self, state: State, round: Round) -> Message:
        """What every client of the cohort receives."""
        arrays = {"w": state["w"]} | ({"buffers": state["buffers"]} if len(state["buffers"]) else {})
        return Message.of(arrays)

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """The next state from at least one reply."""
        raise NotImplementedError(f"{type(self).__name__} must define update(state, replies, round)")

    def round(self, server: Server, state: State, round: Round) -> State:
        """One exchange, then ``update``. If nobody answered, the state stays as it is."""
        replies = server.exchange(self.message(state, round), self.folds)
        if not len(replies):
            return state
        state = self.update(state, replies, round)
        return state | ({"buffers": replies.mean("buffers")} if ("buffers", "mean") in replies.folded else {})

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Numbers of the common test set for the round's row: loss and metrics of every model of ``models``."""
        out: dict[str, Any] = {}
        for name, weights in self.models(state).items():
            prefix = "" if name == "global" else f"{name}/"
            out |= {prefix + k: v for k, v in server.evaluate(weights).items()}
        return out

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Numbers over all clients of the ``global`` model, or what each makes of it, on their own test samples."""
        replies = server.evaluate_clients(self.models(state)["global"], range(server.num_clients))
        return over_clients(replies.ok, server.sizes, server.client_domains)

    def models(self, state: State) -> Mapping[str, Weights]:
        """Models to evaluate by name; ``global`` is the one a run ends with."""
        return {"global": Weights(state["w"], state["buffers"])}

    @property
    def folds(self) -> Fold:
        """What to ask of the workers: sums, or the stack of ``delta`` where the aggregator needs single updates."""
        if is_mean(self.aggregator):
            return self.fold
        kinds = fold_kinds(self.fold)
        if "delta" not in kinds:
            return kinds
        return kinds | {"delta": (*(k for k in kinds["delta"] if k != "mean"), "stack")}

    def aggregate(self, replies: Replies) -> Tensor:
        """The aggregate ``(d,)`` of the clients' ``delta`` under this strategy's aggregator.

        What the rule reports about itself goes into the round's row, as ``aggregator``; rows are named by client.
        """
        if is_mean(self.aggregator):
            return replies.mean("delta")
        report: dict[str, Any] = {}
        asked = {"report": report} if "report" in signature(self.aggregator).parameters else {}
        out: Tensor = self.aggregator(replies.stack("delta"), replies.weights, **asked)
        if asked:
            clients = replies.clients
            named = {k: [clients[i] for i in report[k]] for k in ("dropped", "selected") if k in report}
            replies.log["aggregator"] = {"clients": clients, **report, **named}
        return out


WEIGHTINGS = ("samples", "uniform")


def check_weighting(value: str) -> None:
    """Clients weigh their number of samples, or all the same."""
    check(value in WEIGHTINGS, "weighting", value, f"choose one of {', '.join(WEIGHTINGS)}")


def check(ok: bool, key: str, value: object, expected: str) -> None:
    """Refuse an impossible option of a method, naming its configuration key."""
    if not ok:
        raise ConfigError(f"strategy.{key}={value}: {expected}")
