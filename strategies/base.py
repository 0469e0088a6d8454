"""The server half of a method: state in, state out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clients.base import Client
from fedsim.errors import ConfigError, StrategyError, check_setting, returned
from fedsim.exchange.fold import Fold, fold_kinds
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.clientmetrics import over_clients
from fedsim.server.exchanges import Server
from fedsim.server.handed import Handed, as_message, as_state
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, State, StrategyLike, Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights
from strategies.aggregators import Aggregator, check_enough, is_mean, keeps_size, mean

if TYPE_CHECKING:  # the package takes scipy along
    from fedsim.topology.traffic import Traffic

__all__ = ["State", "Strategy", "check", "check_weighting", "miscounted"]


class Strategy:
    """Base of all methods: one exchange a round, the aggregate of ``delta`` handed to ``update``.

    A subclass sets ``client``, says in ``traits`` how it differs from other methods, and overrides ``update`` (and
    ``init``, ``message`` where it keeps or sends more). One with several exchanges a round, or none, overrides
    ``round``. ``update`` takes means of vectors from ``aggregate`` and sums from ``total``: whatever the aggregator is,
    it then rules over all of them.
    """

    client: Client = Client()
    traits: ClassVar[Traits] = Traits()  # what the simulator must know of the method
    aggregator: Aggregator = staticmethod(mean)
    fold: ClassVar[Fold] = {"delta": "mean"}
    statistics: ClassVar[frozenset[str]] = (
        frozenset()
    )  # of the fold, what no rule for vectors fits: counts and the like

    def check_cohort(self, size: int, most: int) -> None:
        """Refuse an aggregator that needs more updates than ``clients_per_round=size`` gives; there are ``most``
        clients. Called before anything starts."""
        size = 1 if self.traits.pooled else size
        check_enough(
            self.aggregator,
            size,
            f"clients_per_round={size}",
            lambda n: f"clients_per_round={n}" + (f" num_clients={n}" if n > most else ""),
        )

    def most_weight(self, asked: ClientQuestion) -> float:
        """The most that an honest client can weigh: its samples, or 1 where ``weighting=uniform``."""
        uniform = asked.task == "fit" and vars(self).get("weighting") == "uniform"
        return 1.0 if uniform else max(asked.samples, 1.0)

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Why no honest client sends such an update, beyond wrong names, types, shapes, weights and NaN; else nothing.

        A method whose ``update`` reads values, or takes arrays for counts or places, says here what these can be.
        """
        return ""

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
        given = Handed(self, state=state)
        message = as_message(self, self.message(state, round))
        given.check("message")
        traffic = self.traffic(server, state)
        if traffic is None:
            replies = server.exchange(message, self.folds)
        else:
            replies = server.exchange(message, self.folds, traffic=traffic)
        if not (len(replies) or replies.released):
            return state
        state = as_state(self, "update", self.update(state, replies, round), state)
        given.check("update")
        return state | ({"buffers": replies.mean("buffers")} if ("buffers", "mean") in replies.folded else {})

    def traffic(self, server: Server, state: State) -> Traffic | None:
        """What goes over the clients' links in this round, if that is not the message and the answers."""
        return None

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Numbers of the common test set for the round's row: loss and metrics of every model of ``models``."""
        out: dict[str, Any] = {}
        for name, weights in self.models(state).items():
            prefix = "" if name == "global" else f"{name}/"
            out |= {prefix + k: v for k, v in server.evaluate(weights).items()}
        return out

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Numbers over all clients of the ``global`` model, or what each makes of it, on their own test samples."""
        replies = server.evaluate_clients(self.models(state)["global"], server.clients)
        return over_clients(replies.ok, server.sizes, server.client_domains)

    def models(self, state: State) -> Mapping[str, Weights]:
        """Models to evaluate by name; ``global`` is the one a run ends with."""
        return {"global": Weights(state["w"], state["buffers"])}

    @property
    def folds(self) -> Fold:
        """What to ask of the workers: ``fold``, or single vectors where the aggregator needs them.

        Raises:
            ConfigError: an aggregator other than the mean, and no vector that it could rule over.
        """
        return self.folding(self.fold)

    def folding(self, fold: Fold) -> Fold:
        """The same of another ``fold`` than the class's, for exchanges that bring other vectors."""
        if is_mean(self.aggregator):
            return fold
        kinds = fold_kinds(fold)
        vectors = [name for name in kinds if name not in self.statistics]
        if not vectors:
            raise ConfigError(
                f"aggregator: {type(self).__name__} averages no vectors here; leave aggregator out"
            )
        return kinds | {name: _single(kinds[name]) for name in vectors}

    def aggregate(self, replies: Replies, name: str = "delta") -> Tensor:
        """The aggregate ``(d,)`` of the clients' vectors ``name`` under this strategy's aggregator.

        Each of a method's vectors passes the rule by itself: a joint one would see the longest and let an attacker
        hide in the others. What the rule reports goes into the round's row, as ``aggregator``, with clients by id; for
        vectors other than ``delta`` under their name.
        """
        return replies.mean(name) if is_mean(self.aggregator) else self._rule(replies, name, replies.weights)

    def total(self, replies: Replies, name: str) -> Tensor:
        """The sum ``(d,)`` of the clients' vectors ``name``, whatever they weigh.

        Under another aggregator than the mean: n times what it makes of them with equal weights.
        """
        if is_mean(self.aggregator):
            return replies.total(name)
        return self._rule(replies, name, None, sized=True) * len(replies)

    def _rule(self, replies: Replies, name: str, weights: Tensor | None, sized: bool = False) -> Tensor:
        if (sized or name != "delta") and not keeps_size(self.aggregator):
            raise ConfigError(
                f"aggregator.scale=unit: forgets how long updates are, which {type(self).__name__} needs to know of "
                f"'{name}'; type aggregator.scale=median_norm"
            )
        report: dict[str, Any] = {}
        known = signature(self.aggregator).parameters
        offered = {"report": report, "removed": replies.removed, "centre": replies.memory.get(name)}
        asked = {k: v for k, v in offered.items() if k in known}
        stack = replies.stack(name)
        out: Tensor = self.aggregator(stack, weights, **asked)
        if not isinstance(out, Tensor) or out.shape != stack.shape[1:]:
            expected = f"a tensor of shape {tuple(stack.shape[1:])}, one row's"
            raise StrategyError(returned(self, "aggregator", out, expected))
        if "centre" in known:
            replies.memory[name] = out
        if "report" in asked:
            clients = replies.clients
            named = report | {
                k: [clients[i] for i in report[k]] for k in ("dropped", "selected") if k in report
            }
            row = {"clients": clients, **replies.log.get("aggregator", {})}
            replies.log["aggregator"] = {**named, **row} if name == "delta" else {**row, name: named}
        return out


def miscounted(name: str, asked: ClientQuestion, update: Payload) -> str:
    """Why the array ``name`` cannot be a client's counts: not whole, negative, or of more samples than it has."""
    if (counts := update.arrays.get(name)) is None:
        return ""
    found = counts.double()
    if bool((found < 0).any()) or not torch.equal(found, found.floor()):
        return f"'{name}' holds negative or broken numbers, expected counts"
    total = float(found.sum())
    return f"'{name}' counts {total:g} samples of {asked.samples:g}" if total > asked.samples else ""


def _single(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Fold ``kinds`` with single contributions instead of their mean and sum."""
    return tuple(dict.fromkeys("stack" if k in ("mean", "sum") else k for k in kinds))


_: type[StrategyLike] = Strategy  # the type checker sees that nothing is lacking

WEIGHTINGS = ("samples", "uniform")
check = partial(check_setting, "strategy")  # refuses an impossible option of a method


def check_weighting(value: str) -> None:
    """Clients weigh their number of samples, or all the same."""
    check(value in WEIGHTINGS, "weighting", value, f"choose one of {', '.join(WEIGHTINGS)}")
