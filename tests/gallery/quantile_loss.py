"""Quantiles by the pinball loss: the share of targets below each is measured."""

import torch
from torch import nn

import fedsim

g = torch.Generator().manual_seed(0)
x = torch.rand(600, 1, generator=g)
y = 2 * x[:, 0] + torch.randn(600, generator=g) * (0.1 + x[:, 0])


def example(settings: list[str]) -> fedsim.RunResult:
    quantiles = ["task=regression", "task.loss=quantile", "task.quantiles=[0.1,0.5,0.9]"]
    return fedsim.simulate(
        [*quantiles, "num_clients=5", "partition=iid", "client.lr=0.3", *settings],
        model=lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 3)),
        data=(x[:500], y[:500]),
        test=(x[500:], y[500:]),
    )
