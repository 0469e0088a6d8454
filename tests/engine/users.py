"""Clients as users write them, and the shortest way to run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from problems import Problem, classification, method
from torch import nn

from clients.sgd import SGDClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job

EVERYBODY = classification(cohorts=[range(6)] * 2)
TWO = "engine.workers=2"


def with_client(client: Any) -> Any:
    """FedAvg with another local half."""
    strategy = method("fedavg")
    strategy.client = client
    return strategy


def run(client: Any, *overrides: str, problem: Problem = EVERYBODY, **given: Any) -> Any:
    return problem.run("rounds=2", *overrides, strategy=with_client(client), **given)


@dataclass(frozen=True)
class Keeper(SGDClient):
    """Keeps something by ``how``, of what ``setup`` made."""

    how: Callable[[Keeper, Job], object] = field(kw_only=True)
    on_class = 0

    def setup(self, task: Any, layout: Any) -> None:
        vars(self).update(
            seen=[],
            table={"a": np.zeros(3)},
            vector=torch.zeros(3),
            net=nn.Linear(2, 2),
            draws=np.random.default_rng(1),
            spare=1,
        )

    @cached_property
    def squares(self) -> list[int]:
        """Follows from nothing but the client itself."""
        return [i * i for i in range(4)]

    def fit(self, job: Job) -> Update:
        if job.client == 2:
            self.how(self, job)
        return super().fit(job)


def step_of_its_own(client: Any, job: Job) -> None:
    with torch.no_grad():
        client.net.weight -= 0.1


KEPT: dict[str, Callable[[Any, Job], object]] = {
    "count": lambda c, job: vars(c).update(count=1),
    "spare": lambda c, job: vars(c).pop("spare"),
    "seen": lambda c, job: c.seen.append(job.client),
    "table['b']": lambda c, job: c.table.update(b=1),
    "table['a']": lambda c, job: c.table["a"].__iadd__(1),
    "vector": lambda c, job: c.vector.add_(1),
    "vector ": lambda c, job: c.vector.data.add_(1),
    "net.weight": step_of_its_own,
    "draws": lambda c, job: c.draws.random(),
    "on_class": lambda c, job: setattr(type(c), "on_class", 1),
    "squares": lambda c, job: c.squares.append(3) if len(c.squares) > 4 - job.round else None,
}
