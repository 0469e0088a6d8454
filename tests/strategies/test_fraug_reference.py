"""FRAug's rounds computed another way: plain modules, torch.optim and the definitions, in float64, over three rounds.

What it shares with the code under test: the modules of the networks, the initial weights and the random numbers.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, network, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from clients.generators import Generator, RTNet, drawn
from fedsim import rng

ROUNDS, ITERATIONS, D, L, C = 3, 2, 5, 2, 3
SIZES = (10, 7)
LOCAL = {
    "lr": 0.05,
    "lr_decay": 1,
    "momentum": 0.5,
    "weight_decay": 0,
    "clip_norm": "null",
    "shuffle": "false",
}
PACS: dict[str, Any] = {
    "gamma": 0.3,
    "interpolate": True,
    "latent": "normal",
    "draws": 1,
    "lr_generator": 0.05,
    "lr_rtnet": 0.04,
    "dist_generator": "MMD_kernel",
    "dist_rtnet": "L2",
    "lam_generator": 10.0,
    "lam_rtnet": 1.0,
    "share_generator": "all",
}
CASES = {
    "pacs": {},
    "digits": {
        "gamma": 0.002,
        "interpolate": False,
        "dist_generator": "L2",
        "dist_rtnet": "MMD_kernel",
        "lam_generator": 1.0,
        "lam_rtnet": 10.0,
    },
    "officehome": {
        "dist_rtnet": "MMD_kernel",
        "lam_generator": 1.25,
        "lam_rtnet": 1.25,
        "share_generator": "no_bn",
    },
    "uniform": {"latent": "uniform", "draws": 2, "dist_generator": "L1"},
}


def distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """By its definition, with a difference for every pair of rows and every coordinate."""
    if name in ("L1", "L2"):
        return (x - y).abs().mean() if name == "L1" else ((x - y) ** 2).mean()
    pooled = torch.cat([x, y])
    squared = ((pooled[:, None] - pooled[None]) ** 2).sum(2)
    count = len(pooled)
    b0 = float(squared.detach().sum()) / (count**2 - count) / 4
    kernel = sum(torch.exp(-squared / (b0 * 2**i)) for i in range(5))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()  # type: ignore[index]


class Site:
    """One client: its classifier, generator and RTNet, three optimisers that live on, and its class means."""

    def __init__(self, number: int, data: tuple[Tensor, Tensor], hp: dict[str, Any]):
        self.number, self.hp = number, hp
        self.x, self.y = data[0].double(), data[1]
        self.theta: Any = network("bn").double()
        self.omega = Generator(D, L, C).double()
        seed = rng.torch_rng(0, "fit/rtnet", 0, number).initial_seed()
        self.phi: Any = drawn(partial(RTNet, D, L, C), seed, torch.float64).module
        self.means = torch.zeros(C, D, dtype=torch.float64)
        nets = ((self.theta, LOCAL["lr"]), (self.omega, hp["lr_generator"]), (self.phi, hp["lr_rtnet"]))
        self.sgd = [torch.optim.SGD(net.parameters(), lr=lr, momentum=0.5) for net, lr in nets]

    def train(self, t: int) -> None:
        """One round, its latent draws in the order z1 ... z5 (z1 z2 of every draw first)."""
        hp, noise = self.hp, rng.torch_rng(0, "fit/latent", t, self.number)
        r = np.exp(hp["gamma"] * (t - ROUNDS))
        lam = min(0.5, r)

        def z() -> Tensor:
            make = torch.randn if hp["latent"] == "normal" else torch.rand
            return make((len(self.y), L), generator=noise).double()

        for it in range(ITERATIONS):
            self.classifier(t, it, lam, r, z)
            labels = self.balanced((t * ITERATIONS + it) * len(self.y))
            self.generator(labels, z())
            self.rtnet(labels, z(), z())

    def balanced(self, start: int) -> Tensor:
        return torch.tensor([(start + i) % C for i in range(len(self.y))])

    def classifier(self, t: int, it: int, lam: float, r: float, z: Any) -> None:
        self.theta.train(), self.omega.eval(), self.phi.eval()
        u = self.theta.features(self.x)
        real = F.cross_entropy(self.theta.head(u), self.y)
        for c in self.y.unique().tolist():
            self.means[c] = 0.7 * self.means[c] + 0.3 * u.detach()[self.y == c].mean(0)
        parts = []
        for s in range(self.hp["draws"]):
            yb = self.balanced((t * ITERATIONS + it * self.hp["draws"] + s) * len(self.y))
            with torch.no_grad():
                made_c = self.phi(self.omega(z(), yb), self.means[yb], yb)
                made_s = self.phi(self.omega(z(), self.y), u, self.y)
                if self.hp["interpolate"]:
                    made_c = r * made_c + (1 - r) * self.means[yb]
                    made_s = r * made_s + (1 - r) * u
            head = self.theta.head
            parts.append(0.5 * (F.cross_entropy(head(made_c), yb) + F.cross_entropy(head(made_s), self.y)))
        loss = lam * sum(parts) / len(parts) + (1 - lam) * real
        self.step(0, loss)

    def generator(self, labels: Tensor, z: Tensor) -> None:
        self.theta.eval(), self.omega.train()
        v, name = self.omega(z, labels), self.hp["dist_generator"]
        anchor = self.theta.features(self.x).detach() if name.startswith("MMD") else self.means[labels]
        apart = distance(name, v, anchor)
        self.step(1, F.cross_entropy(self.theta.head(v), labels) - self.hp["lam_generator"] * apart)

    def rtnet(self, labels: Tensor, z4: Tensor, z5: Tensor) -> None:
        self.theta.eval(), self.omega.eval(), self.phi.train()
        u, name = self.theta.features(self.x).detach(), self.hp["dist_rtnet"]
        a1 = self.phi(self.omega(z4, labels).detach(), self.means[labels], labels)
        a2 = self.phi(self.omega(z5, self.y).detach(), u, self.y)
        far = 0.5 * (distance(name, a1, self.means[labels]) + distance(name, a2, u))
        doubts = []
        for a in (a1, a2):
            p = torch.softmax(self.theta.head(a), 1)
            doubts.append(-(p * p.log()).sum(1).mean())
        self.step(2, -0.5 * sum(doubts) + self.hp["lam_rtnet"] * far)

    def step(self, which: int, loss: Any) -> None:
        net = (self.theta, self.omega, self.phi)[which]
        self.sgd[which].zero_grad()
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g
        self.sgd[which].step()


def shared(net: nn.Module, with_norm: bool) -> dict[str, Tensor]:
    """What is averaged: all floating-point tensors, or those outside BatchNorm."""
    norms = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm1d)}
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    return {k: v for k, v in state.items() if with_norm or k.rpartition(".")[0] not in norms}


def federated(data: list[tuple[Tensor, Tensor]], hp: dict[str, Any]) -> tuple[dict[str, Tensor], list[Site]]:
    """Three rounds with both clients; the shared part of classifier and generator after the last average."""
    sites = [Site(k, pair, hp) for k, pair in enumerate(data)]
    first = drawn(partial(Generator, D, L, C), rng.key(0, "server/generator") >> 1, torch.float64).module
    for site in sites:
        site.omega.load_state_dict(first.state_dict())
    whole = hp["share_generator"] == "all"
    total, out = sum(len(y) for _, y in data), dict[str, Tensor]()
    for t in range(ROUNDS):
        for site in sites:
            site.train(t)
        for prefix, with_norm in (("theta", False), ("omega", whole)):
            models = [shared(getattr(site, prefix), with_norm) for site in sites]
            for name in models[0]:
                mean = sum(len(s.y) / total * m[name] for s, m in zip(sites, models, strict=True))
                out[f"{prefix}/{name}"] = mean  # type: ignore[assignment]
        for site in sites:
            for name, value in copy.deepcopy(out).items():
                prefix, _, key = name.partition("/")
                getattr(site, prefix).state_dict()[key].copy_(value)
    return out, sites


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_of_two_clients_by_the_equations(case: str) -> None:
    hp, data = PACS | CASES[case], classes(SIZES)
    problem = classification("bn", clients=data, cohorts=[[0, 1]] * ROUNDS)
    options = [f"strategy.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in hp.items()]
    local = [f"client.{k}={v}" for k, v in LOCAL.items()]
    work = [
        "buffers=all_local",
        f"client.epochs={ITERATIONS}",
        "client.batch_size=100",
        "dtype=float64",
        f"rounds={ROUNDS}",
    ]
    run, _ = recorded("fraug", problem, *options, f"strategy.rounds={ROUNDS}", *local, *work)
    expected, sites = federated(data, hp)
    theta = drawn(partial(network, "bn"), 0, torch.float64)
    omega = drawn(partial(Generator, D, L, C), 0, torch.float64)
    state = run.states[-1]
    found = {f"theta/{k}": v for k, v in theta.layout.named(state["w"]).items()}
    found |= {f"omega/{k}": v for k, v in omega.layout.named(state["generator"]).items()}
    found |= {f"omega/{k}": v for k, v in omega.layout.named_buffers(state["generator_buffers"]).items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for site, kept in zip(sites, run.kept[-1], strict=True):
        torch.testing.assert_close(kept["prototypes"], site.means, rtol=0, atol=1e-12)
        phi = nn.utils.parameters_to_vector(site.phi.parameters())
        torch.testing.assert_close(kept["rtnet"], phi.detach(), rtol=0, atol=1e-12)
        statistics = torch.cat([site.theta[1].running_mean, site.theta[1].running_var])
        torch.testing.assert_close(kept["local/buffers"], statistics, rtol=0, atol=1e-12)
