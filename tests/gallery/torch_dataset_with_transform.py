"""A torch data set whose transform draws anew each time; repeatable, since clients' generators are seeded."""

import torch
from torch import nn
from torch.utils.data import Dataset

import fedsim


class Noisy(Dataset):
    def __init__(self, size, seed, noise=0.1):
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
        self.y, self.noise = (self.x.sum(1) > 0).long(), noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(6), self.y[i]


def example(settings: list[str]) -> fedsim.RunResult:
    clients = [Noisy(100, seed) for seed in range(4)]
    return fedsim.simulate(
        ["client.lr=0.2", *settings],
        model=lambda: nn.Linear(6, 2),
        clients=clients,
        test=Noisy(200, 9, noise=0),
    )
