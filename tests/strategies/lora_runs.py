"""Six methods of low-rank adapters on one small problem, and the same by hand: plain loops over the same batches."""

from __future__ import annotations

from typing import Any

import torch
from adapting import adapted
from problems import QUIET
from torch import Tensor, nn

import fedsim
from clients.exact import fresh
from fedsim.task.layout import Layout
from fedsim.task.lowrank import adapters_of

METHODS = ("fedit", "ffa", "fedsa", "rolora", "fedex", "flora")
NAMES = (
    "0.base.weight",
    "0.base.bias",
    "0.lora_A",
    "0.lora_B",
    "2.base.weight",
    "2.base.bias",
    "2.lora_A",
    "2.lora_B",
)
SIZES, LR = (8, 12, 4, 8), 0.2


def clients() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=g) + i, torch.randint(0, 3, (n,), generator=g))
        for i, n in enumerate(SIZES)
    ]


def run(method: str, *overrides: str, **given: Any) -> fedsim.RunResult:
    settings = ("engine=serial", *QUIET, "dtype=float64", "rounds=3", f"strategy={method}", f"client.lr={LR}")
    local = (
        "client.epochs=2",
        "client.batch_size=4",
        "client.shuffle=false",
        "clients_per_round=4",
        "engine.chunks=2",
    )
    parts: dict[str, Any] = {"model": adapted, "clients": clients(), "test": clients()[0]}
    return fedsim.simulate([*settings, *local, *overrides], **{**parts, **given})


# -- the same by hand ---------------------------------------------------------------------------------------------


Matrices = dict[str, Tensor]


def local_steps(model: Matrices, data: tuple[Tensor, Tensor], trained: tuple[str, ...]) -> Matrices:
    """Two passes of plain SGD over batches of 4, of the matrices whose names end as ``trained`` says."""
    own = {k: v.clone().requires_grad_(k.endswith(trained)) for k, v in model.items()}
    x, y = data[0].double(), data[1]
    for _ in range(2):
        for i in range(0, len(y), 4):
            h = x[i : i + 4]
            for layer in "02":
                weight = own[f"{layer}.base.weight"] + 2 * own[f"{layer}.lora_B"] @ own[f"{layer}.lora_A"]
                h = h @ weight.T + own[f"{layer}.base.bias"]
                h = torch.tanh(h) if layer == "0" else h
            names = [k for k, v in own.items() if v.requires_grad]
            grads = torch.autograd.grad(nn.functional.cross_entropy(h, y[i : i + 4]), [own[k] for k in names])
            with torch.no_grad():
                for k, grad in zip(names, grads, strict=True):
                    own[k] -= LR * grad
    return {k: v.detach() for k, v in own.items()}


def by_hand(method: str, rounds: int, p: Tensor) -> tuple[Matrices, list[Matrices]]:
    """Global matrices, the bases with all that was added to them, and the clients' own after ``rounds``."""
    model = {k: v.double() for k, v in adapted().state_dict().items()}
    kept = [{k: v for k, v in model.items() if k.endswith("lora_B")} for _ in SIZES]
    layout = Layout(adapted(), torch.float64)
    for t in range(rounds):
        trained: tuple[str, ...] = ("lora_A", "lora_B")
        if method == "ffa" or (method == "rolora" and t % 2 == 0):
            trained = ("lora_B",)
        elif method == "rolora":
            trained = ("lora_A",)
        starts = [model | own if method == "fedsa" else model for own in kept]
        found = [local_steps(start, data, trained) for start, data in zip(starts, clients(), strict=True)]
        kept = [{k: v for k, v in f.items() if k.endswith("lora_B")} for f in found]
        averaged = trained if method != "fedsa" else ("lora_A",)
        new = {
            k: sum(q * f[k] for q, f in zip(p, found, strict=True)) if k.endswith(averaged) else v
            for k, v in model.items()
        }
        for layer in "02" if method in ("fedex", "flora") else "":
            a, b, w = (f"{layer}.{k}" for k in ("lora_A", "lora_B", "base.weight"))
            exact = model[w] + 2 * sum(q * f[b] @ f[a] for q, f in zip(p, found, strict=True))
            new[w] = exact if method == "flora" else exact - 2 * new[b] @ new[a]
        if method == "flora":
            drawn = torch.zeros(layout.dim, dtype=torch.float64)
            fresh(drawn, adapters_of(adapted(), layout), 0, t + 1)
            new |= layout.named(drawn)
        model = new
    return model, kept


def state(result: fedsim.RunResult) -> Matrices:
    """The run's matrices, with what was added to the bases in them."""
    out = dict(result.model().state_dict())
    for name in [k for k in out if k.endswith("base_change")]:
        weight = name.replace("base_change", "weight")
        out[weight] = out[weight] + out.pop(name)
    return out


A, B = 4 * 2 + 4 * 2, 4 * 2 + 3 * 2  # numbers of both layers' factors
