"""A client whose class says that it may run vectorised, and the shortest way to run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from problems import classification
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.local.job import Job
from strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class DeclaredClient(SGDClient):
    """Declares itself; a subclass says what goes wrong, or does not."""

    vectorisable = True

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.sgd(w, job.grad(w, batch).mul_(0.5 ** (job.steps + 1)))


class With(FedAvg):
    """FedAvg with another client."""

    def __init__(self, client: type[SGDClient]):
        self.kind = client
        super().__init__(server_lr=1.0, weighting="samples")

    def make_client(self) -> Any:
        return self.kind(weighting="samples")


def run(client: type[SGDClient], *settings: str) -> Any:
    problem = classification(cohorts=[range(6)] * 2)
    return problem.run("rounds=2", "dtype=float64", *settings, strategy=With(client))
