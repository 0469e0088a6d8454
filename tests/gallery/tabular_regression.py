"""Numbers from a table: squared error, mean absolute error."""

import torch
from torch import nn

import fedsim

x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
y = 3 * x[:, 0] - x[:, 1] * x[:, 2] + 1


def example(settings: list[str]) -> fedsim.RunResult:
    return fedsim.simulate(
        ["task=regression", "num_clients=5", "partition=iid", "client.lr=0.05", *settings],
        model=lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)),
        data=(x[:400], y[:400]),
        test=(x[400:], y[400:]),
    )
