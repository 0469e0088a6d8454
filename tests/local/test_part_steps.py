"""Several optimisers of one job, each of a part of the parameters: against torch.optim, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, classification, network
from torch import Tensor, nn

from clients.base import Client
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from strategies.fedavg import FedAvg


class CriticAndGenerator(nn.Module):
    """Two networks, one of which is trained against the other."""

    def __init__(self) -> None:
        super().__init__()
        self.critic_a, self.generator = network(), nn.Linear(4, 4)
        self.critic_b = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.critic_b(self.critic_a(x))


def critic_loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def against(model: Any, x: Tensor) -> Tensor:
    return model(model.generator(x))


def generator_loss(output: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy(output, y).clamp(max=3)


class TwoClient(Client):
    """Critic and generator in turn, with an optimiser each."""

    def fit(self, job: Job) -> Update:
        w = job.start()
        critic = job.optimiser("critic_*", lr=0.05, momentum=0.9, weight_decay=0.1, schedule="linear")
        generator = job.optimiser(
            ["generator.*"], lr=0.02, adam={"beta1": 0.5}, decoupled=True, clip_norm=0.1
        )
        for batch in job.batches():
            critic(w, job.grad(w, batch, forward=against, loss=critic_loss))
            generator(w, job.grad(w, batch, forward=against, loss=generator_loss))
        return self.finish(job, w)


def test_two_optimisers_of_one_job_move_their_own_parts() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = CriticAndGenerator().double()
    ours = copy.deepcopy(theirs)
    rng = torch.Generator().manual_seed(3)
    x, y = torch.randn(6, 4, generator=rng).double(), torch.randint(3, (6,), generator=rng)
    strategy = FedAvg(server_lr=1.0, weighting="samples")
    strategy.client = TwoClient()
    problem = Problem(
        model=ours, clients=[(x, y)], settings=("dtype=float64", "clients_per_round=1", "rounds=1")
    )
    steps = ("client.steps=30", "client.batch_size=6", "client.weight_decay=0.01", "client.shuffle=false")
    run = problem.run(*steps, strategy=strategy)
    critics = [p for n, p in theirs.named_parameters() if n.startswith("critic")]
    first = torch.optim.SGD(critics, lr=0.05, momentum=0.9, weight_decay=0.1)
    second = torch.optim.AdamW(theirs.generator.parameters(), lr=0.02, betas=(0.5, 0.999), weight_decay=0.01)
    falling = torch.optim.lr_scheduler.LinearLR(first, 1.0, 0.0, total_iters=30)
    for _ in range(30):
        theirs.zero_grad()
        critic_loss(against(theirs, x), y).backward()
        first.step()
        theirs.zero_grad()
        generator_loss(against(theirs, x), y).backward()
        nn.utils.clip_grad_norm_(theirs.generator.parameters(), 0.1)
        second.step()
        falling.step()
    torch.testing.assert_close(dict(run.weights), dict(theirs.state_dict()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"params": "haed.*"}, "'haed.\\*' matches no parameter"),
        ({"params": "3.*"}, "nearest is"),
        ({"lrr": 1}, "no setting 'lrr'; nearest is 'lr'"),
        ({"accumulate": 2}, "no setting 'accumulate'"),
        ({"adam": {"beta3": 1}}, "adam has no 'beta3'; nearest is 'beta"),
    ],
)
def test_an_optimiser_that_cannot_be_says_why(how: dict[str, Any], message: str) -> None:
    class Asks(Client):
        def fit(self, job: Job) -> Update:
            job.optimiser(**how)
            return super().fit(job)

    strategy = FedAvg(server_lr=1.0, weighting="samples")
    strategy.client = Asks()
    with pytest.raises(ClientError, match=message):
        classification().run("rounds=1", strategy=strategy)
