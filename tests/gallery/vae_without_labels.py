"""A variational autoencoder: no targets, and a loss that calls the model itself."""

import torch
import torch.nn.functional as F
from torch import nn

import fedsim

g = torch.Generator().manual_seed(0)
x = torch.randn(500, 2, generator=g) @ torch.randn(2, 10, generator=g)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 4), nn.Linear(2, 10)

    def forward(self, x):
        mean, log_var = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var


def elbo(model, batch):
    out, mean, log_var = model(batch.x)
    return F.mse_loss(out, batch.x) - 0.01 * (1 + log_var - mean**2 - log_var.exp()).sum(-1).mean()


def example(settings: list[str]) -> fedsim.RunResult:
    clients = [(part, None) for part in x[:400].chunk(4)]
    return fedsim.simulate(
        ["client.lr=0.1", *settings], model=VAE, clients=clients, test=(x[400:], None), loss=elbo
    )
