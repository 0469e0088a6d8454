"""FedETF. Li, Shang, He, Lin, Wu: No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with
Synthetic and Fixed Classifier, ICCV 2023."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from clients.base import Client
from clients.fedetf import FedETFClient, frame
from fedsim.server.traits import Traits
from fedsim.task.heads import Head, HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights
from strategies.base import State, check
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedETF(FedAvg):
    """FedAvg of a body that is trained against a fixed dense ETF on normalised features.

    ``temperature`` scales the cosines (learnt in the paper, fixed here), ``gamma`` weighs the log of the client's class
    shares in the loss. The global model carries the ETF as its head: same predictions, since a feature's length does
    not change which cosine is largest, but its reported loss is that of features as long as they come.
    """

    traits: ClassVar[Traits] = replace(FedAvg.traits, features=True, linear_head=True, body=True, labels=True)
    temperature: float
    gamma: float
    seed: int
    slots: HeadSlots = field(init=False, repr=False, compare=False)

    def make_client(self) -> Client:
        """The balanced loss on cosines."""
        check(self.temperature > 0, "temperature", self.temperature, "must be positive")
        check(self.gamma >= 0, "gamma", self.gamma, "the weight of the prior must not be negative")
        return FedETFClient(
            weighting=self.weighting, temperature=self.temperature, gamma=self.gamma, seed=self.seed
        )

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the head's place."""
        self.slots = HeadSlots.of(layout)

    def models(self, state: State) -> Mapping[str, Weights]:
        """The body under the ETF."""
        w = state["w"]
        weight = self.temperature * frame(*self.slots.shape, self.seed).to(w)
        head = Head(weight, weight.new_zeros(len(weight)))
        return {"global": Weights(self.slots.put(w, head), state["buffers"])}
