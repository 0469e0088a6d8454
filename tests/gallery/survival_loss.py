"""Survival times with censoring: the Cox partial likelihood, and the concordance index as a metric of its own."""

import torch
from torch import nn

import fedsim

g = torch.Generator().manual_seed(0)
x = torch.randn(500, 4, generator=g)
event = (torch.rand(500, generator=g) < 0.7).float()
times = torch.rand(500, generator=g).log().neg() / (x[:, 0] - x[:, 1]).exp()
y = {"time": times, "event": event}


def cox(risk, y):
    at_risk = y["time"] >= y["time"][:, None]  # of each sample: those still there at its time
    others = torch.where(at_risk, risk.squeeze(-1), -torch.inf).logsumexp(1)
    return ((others - risk.squeeze(-1)) * y["event"]).sum() / y["event"].sum().clamp(min=1)


def concordance(risk, y):
    first = (y["time"][:, None] < y["time"]) & (y["event"][:, None] > 0)
    return (first & (risk > risk.squeeze(-1))).sum(), first.sum()


def example(settings: list[str]) -> fedsim.RunResult:
    cut = [{k: v[i : i + 100] for k, v in y.items()} for i in range(0, 500, 100)]
    parts = list(zip(x.split(100), cut, strict=True))
    return fedsim.simulate(
        ["client.lr=0.3", *settings],
        model=lambda: nn.Linear(4, 1),
        clients=parts[:4],
        test=parts[4],
        loss=cox,
        metrics={"concordance": concordance},
    )
