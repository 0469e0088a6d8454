"""What theory says exactly, measured: seconds to minutes on one core. ``python -m experiments.claims theory``.

``optimisers``: ten quadratics in R^5 in float64, clients of 2 to 12 local steps, half of them a round. Who reaches the
optimum of equally weighted clients, whose distance to the optimum falls with the learning rate, and who stalls.
``breakdown``: distance of a rule's result from the honest mean against the share of attackers, the worst of three
attacks. ``variance``: of weights under gossip averaging without training, against what the mixing matrix predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

import fedsim
from fedsim.task.layout import Slot
from fedsim.topology import random_regular
from fedsim.topology.mixing import mixing
from strategies import aggregators
from strategies.averaging import Correction, mix, variances

CLIENTS, DIM = 10, 5
STEPS = np.linspace(2, 12, CLIENTS).round().astype(int)  # of each client in a round
RATES: Mapping[float, int] = {0.1: 100, 0.04: 250, 0.016: 600}  # learning rate: rounds
METHODS: Mapping[str, Sequence[str]] = {
    "fedavg": ("strategy=fedavg", "strategy.weighting=uniform"),
    "fednova": ("strategy=fednova",),
    "scaffold": ("strategy=scaffold",),
    "feddyn": ("strategy=feddyn",),
    "fedspeed_rho0": ("strategy=fedspeed", "strategy.rho=0"),
}
RULES: Mapping[str, Callable[[int], Callable[[Tensor], Tensor]]] = {  # of f
    "mean": lambda f: aggregators.mean,
    "coordinate median": lambda f: aggregators.coordinate_median,
    "trimmed mean": lambda f: partial(aggregators.trimmed_mean, f=f),
    "Krum": lambda f: partial(aggregators.krum, f=f),
    "Multi-Krum": lambda f: partial(aggregators.multi_krum, f=f),
    "geometric median": lambda f: aggregators.geometric_median,
    "flag, raw": lambda f: partial(aggregators.flag, scale="raw"),
    "flag, median norm": lambda f: aggregators.flag,
}
ROWS, WRONG = 20, (0, 2, 4, 6, 8)  # updates, and how many of them are hostile
PEERS, DEGREE, WEIGHTS = 32, 8, 10_000
TIMES = (0, 1, 2, 3, 5, 10, 20, 50)


class Bowl(nn.Module):
    """One vector ``x`` (d,); a sample is a matrix ``A`` (d, d) and, twice, a vector ``b`` (d,)."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.x, a


def energy(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """The mean over the batch of ``x'Ax / 2 - b'x``."""
    x, a = output
    return (0.5 * (a @ x) @ x - y[:, :DIM] @ x).mean()


def _uniform(output: tuple[Tensor, Tensor], y: Tensor) -> float:
    return float((output[0] - y[0, :DIM]).norm())


def _weighted(output: tuple[Tensor, Tensor], y: Tensor) -> float:
    return float((output[0] - y[0, DIM:]).norm())


def bowls(seed: int) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """A quadratic per client, as often as it has steps, and a test sample: both optima, of clients that weigh alike and
    by samples."""
    rng = np.random.default_rng(seed)
    turns = [np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(CLIENTS)]
    a = np.stack([q @ np.diag(rng.uniform(0.5, 2.0, DIM)) @ q.T for q in turns])
    a, b = (a + a.transpose(0, 2, 1)) / 2, 2 * rng.normal(size=(CLIENTS, DIM))
    best = [
        np.linalg.solve(np.einsum("i,ijk->jk", w, a), w @ b) for w in (np.ones(CLIENTS), STEPS.astype(float))
    ]
    clients = [
        (torch.tensor(a[i]).expand(k, -1, -1).clone(), torch.tensor([*b[i], *b[i]]).expand(k, -1).clone())
        for i, k in enumerate(STEPS)
    ]
    return clients, (torch.eye(DIM, dtype=torch.float64)[None], torch.tensor(np.concatenate(best))[None])


def descend(method: str, lr: float, rounds: int, seed: int, out: Path) -> fedsim.RunResult:
    """One run; it measures ``distance`` and ``weighted_distance`` ten times."""
    clients, test = bowls(seed)
    settings = [
        f"dir={out / f'{method}-{lr}-s{seed}'}",
        f"method={method}",
        *METHODS[method],
        f"client.lr={lr}",
        f"rounds={rounds}",
        f"seed={seed}",
        "dtype=float64",
        "engine=serial",
        "tracker=quiet",
        "client.epochs=1",
        "client.batch_size=1",
        f"clients_per_round={CLIENTS // 2}",
        f"evaluation.every={max(1, rounds // 10)}",
        "checkpoint.every=0",
    ]
    return fedsim.simulate(
        settings,
        model=Bowl(),
        clients=clients,
        test=test,
        loss=energy,
        metrics={"distance": _uniform, "weighted_distance": _weighted},
    )


def optimisers(seeds: Sequence[int], out: Path, rates: Mapping[float, int] = RATES) -> list[str]:
    """A table: the largest distance over seeds at the end of the runs, which lie in ``out``/lr..."""
    head = " | ".join(f"lr {lr:g}, {n} rounds" for lr, n in rates.items())
    lines = [f"| method | optimum | {head} |", "|---|---|" + "---|" * len(rates)]
    for method in METHODS:
        rows = [
            [descend(method, lr, n, s, out / f"lr{lr:g}").rows[-1] for s in seeds] for lr, n in rates.items()
        ]
        for column, name in (("distance", "clients alike"), ("weighted_distance", "by samples")):
            cells = [f"{max(r[column] for r in found):.2g}" for found in rows]
            lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return lines


def breakdown(seeds: Sequence[int], dim: int = 100) -> list[str]:
    """A table: distance from the honest mean, in deviations of one honest update, the worst attack, mean over seeds."""
    lines = ["| rule | " + " | ".join(f"{f} of {ROWS}" for f in WRONG) + " |", "|---|" + "---|" * len(WRONG)]
    for name, rule in RULES.items():
        cells = [f"{np.mean([_worst(rule(f), f, s, dim) for s in seeds]):.2f}" for f in WRONG]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _worst(rule: Callable[[Tensor], Tensor], f: int, seed: int, dim: int) -> float:
    """Over a far point, the honest mean reversed ten times, and ALIE's."""
    rng = torch.Generator().manual_seed(seed)
    honest = torch.randn(ROWS - f, dim, generator=rng, dtype=torch.float64) + 1.0
    middle = honest.mean(0)
    z = NormalDist().inv_cdf((ROWS - f - (ROWS // 2 + 1 - f)) / (ROWS - f)) if f else 0.0
    sent = (
        100.0 * torch.randn(dim, generator=rng, dtype=torch.float64),
        -10 * middle,
        middle - z * honest.std(0),
    )
    found = [rule(torch.cat([honest, wrong.expand(f, dim)])) for wrong in sent]
    return max(float((out - middle).norm()) for out in found) / dim**0.5


def variance(seeds: Sequence[int]) -> list[str]:
    """A table: variance of a peer's weights over that at the start; mean over peers and seeds."""
    rows = {name: np.zeros(len(TIMES)) for name in ("plain, predicted", "plain", "corrected")}
    slots = [Slot("weight", (100, WEIGHTS // 100), 0, WEIGHTS)]
    for seed in seeds:
        heard = random_regular(PEERS, seed, degree=DEGREE, connected="retry").at(0).astype(float).tocsr()
        own, others = mixing("conservative", heard)
        matrix = np.diag(own) + others.toarray()
        start = np.random.default_rng(seed).normal(size=(PEERS, WEIGHTS))
        models = {"plain": start.copy(), "corrected": start.copy()}
        for t in range(max(TIMES) + 1):
            if t in TIMES:
                power = np.linalg.matrix_power(matrix, t)
                rows["plain, predicted"][TIMES.index(t)] += np.square(power).sum() / PEERS / len(seeds)
                for name, model in models.items():
                    rows[name][TIMES.index(t)] += variances(model, slots).mean() / len(seeds)
            for name, model in models.items():
                correction = Correction() if name == "corrected" else None
                mix(model, model, own, others, heard, slots, correction)
    lines = ["| rounds | " + " | ".join(map(str, TIMES)) + " |", "|---|" + "---|" * len(TIMES)]
    return lines + [f"| {name} | {' | '.join(f'{v:.4f}' for v in found)} |" for name, found in rows.items()]
