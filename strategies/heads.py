"""The server half of methods that share features and differ in the head: features once, then every head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fedsim.exchange.payload import Message
from fedsim.server.clientmetrics import over_clients
from fedsim.server.exchanges import Server
from fedsim.server.traits import Traits
from fedsim.task.heads import Head, HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights
from strategies.base import State
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class HeadStrategy(FedAvg):
    """FedAvg over a model whose head is one classifier among several. A subclass names them in ``heads``."""

    traits: ClassVar[Traits] = replace(FedAvg.traits, features=True, linear_head=True, body=True, labels=True)
    slots: HeadSlots = field(init=False, repr=False, compare=False)

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the head in the model."""
        self.slots = HeadSlots.of(layout)

    def heads(self, state: State) -> Mapping[str, Head]:
        """Global classifiers by name; ``""`` is the method's own."""
        return {"": self.slots.of_model(state["w"])}

    def models(self, state: State) -> Mapping[str, Weights]:
        """``global`` holds the method's own classifier; ``trained`` is what training goes on with."""
        own = self.slots.put(state["w"], self.heads(state)[""])
        return {"global": Weights(own, state["buffers"]), "trained": Weights(state["w"], state["buffers"])}

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Every classifier on the common test set; ``absent_classes`` if nobody has samples of some."""
        if not server.test_size:
            return {}
        h, out = server.features(Weights(state["w"], state["buffers"])), dict[str, Any]()
        for name, head in self.heads(state).items():
            found = server.score(Head(*(t.to(h) for t in head))(h))
            out |= {f"{name}/{k}" if name else k: v for k, v in found.items()}
        if server.class_counts is not None and (absent := int((server.class_counts == 0).sum())):
            out["absent_classes"] = absent
        return out

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Every client's personal classifiers; features of the common test set are not computed again in a simulation.

        ``untrained`` counts clients that were never in a cohort.
        """
        message = self.message(state, server.round).shared.arrays
        shared = server.share_buffers or not len(
            state["buffers"]
        )  # else every client has features of its own
        if server.own_tests is not None and shared and not server.remote:
            message = {**message, "features": server.features(Weights(state["w"], state["buffers"]))}
        everyone = server.clients
        replies = server.exchange(Message.of(message), {}, task="evaluate", clients=everyone)
        out = over_clients(replies.ok, server.sizes)
        if "untrained" in out:
            out["untrained"] = sum(o.metrics.get("untrained", 0.0) for o in replies.ok)
        return out
