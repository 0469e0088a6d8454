"""A generative adversarial network: one local rule, two optimisers over two groups of parameters."""

import torch
import torch.nn.functional as F
from torch import nn

import fedsim
from clients.sgd import SGDClient
from strategies.fedavg import FedAvg

x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 2


def networks():
    critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    return nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": critic})


def critic_loss(model, batch):
    fake = model.generator(torch.randn_like(batch.x)).detach()
    return (F.softplus(-model.critic(batch.x)) + F.softplus(model.critic(fake))).mean()


def generator_loss(model, batch):
    return F.softplus(-model.critic(model.generator(torch.randn_like(batch.x)))).mean()


def distance(model, batch):  # of the means, to be measured
    return (model.generator(torch.randn_like(batch.x)).mean(0) - batch.x.mean(0)).square().sum()


class Adversarial(SGDClient):
    def begin(self, job, w):
        job.two = [job.optimiser("critic.*", lr=0.1), job.optimiser("generator.*", lr=0.1)]
        return w

    def step(self, job, w, batch):
        for steps, loss in zip(job.two, (critic_loss, generator_loss), strict=True):
            w = steps(w, job.grad(w, batch, loss=loss))
        return w


def example(settings: list[str]) -> fedsim.RunResult:
    method = FedAvg(server_lr=1.0, weighting="samples")
    method.client = Adversarial(weighting="samples")
    data = {"clients": [(part, None) for part in x[:400].chunk(4)], "test": (x[400:], None)}
    return fedsim.simulate(settings, model=networks, loss=distance, strategy=method, **data)
