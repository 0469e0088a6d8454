"""Server halves that take the local rule of another method, ``strategy@strategy.base=fedprox``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsim.exchange.payload import Replies
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from strategies.base import State, Strategy, check
from strategies.fedavg import FedAvg

SERVER_HALF = ("init", "message", "update", "round", "fold", "evaluate", "evaluate_clients", "models")


@dataclass(kw_only=True)
class Composed(Strategy):
    """What the server does is this method's; what clients do locally is that of ``base``, with its ``server_lr``.

    As it stands it is FedAvg with the local rule of ``base``, which is where methods go back to at the values of their
    options that mean FedAvg. ``base`` is any method whose server averages as FedAvg's does and that keeps nothing at
    the clients which belongs to one global model (duals, control variates).
    """

    base: FedAvg

    def take(self, traits: Traits) -> None:
        """Check ``base``, and let the method need of model and data what its local rule does."""
        base, known = self.base, "type strategy@strategy.base=fedavg, or fedprox, fedsam, fedntd, ..."
        name = type(base).__name__
        own = isinstance(base, FedAvg) and all(
            getattr(type(base), part) is getattr(FedAvg, part) for part in SERVER_HALF
        )
        check(own, "base", name, f"its server does more than average; {known}")
        plain = base.traits.buffers is None and not (base.traits.one_step or base.traits.pooled)
        check(plain, "base", name, f"has ways of its own with BatchNorm or steps; {known}")
        wants = ("features", "linear_head", "body", "labels", "unlabelled", "horizon")
        needs = {k: getattr(base.traits, k) for k in wants}
        asked_only = traits.asked_only and base.traits.asked_only
        self.traits = replace(traits, asked_only=asked_only, **needs)  # type: ignore[misc]

    def setup(self, task: Task, layout: Layout) -> None:
        """The base's."""
        self.base.setup(task, layout)

    def most_weight(self, asked: ClientQuestion) -> float:
        """The base's."""
        return self.base.most_weight(asked)

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """FedAvg's."""
        return state | {"w": state["w"] + self.base.server_lr * self.aggregate(replies)}
