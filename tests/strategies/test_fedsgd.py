"""FedSGD: one gradient a round."""

from __future__ import annotations

import pytest
import torch
from problems import (
    Problem,
    classes,
    classification,
    network,
)

from fedsim.errors import ConfigError


def test_fedsgd_is_torchs_sgd_on_the_mean_gradient() -> None:
    clients = classes((8, 8, 8))
    settings = ("strategy=fedsgd", "client.steps=1", "client.batch_size=8", "client.weight_decay=0")
    options = ("strategy.weight_decay=0.01", "strategy.lr_decay=0.5", "strategy.decay_every=2")
    problem = Problem(
        network(), clients, ("rounds=5", "clients_per_round=3", "dtype=float64", "client.lr=0.3")
    )
    run = problem.run(*settings, *options, "client.clip_norm=null")
    model = network().double()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5)
    for _ in range(5):
        optimiser.zero_grad()
        sum(torch.nn.functional.cross_entropy(model(x.double()), y) / 3 for x, y in clients).backward()
        optimiser.step()
        schedule.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.weights[name], value, rtol=0, atol=1e-12)


def test_fedsgd_asks_for_one_step() -> None:
    with pytest.raises(ConfigError, match=r"one gradient a round; add client.steps=1"):
        classification().run("strategy=fedsgd")
