"""What averaging over clients must leave right: norms, frozen statistics, masks; and the same bits on any workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose_quickly
from problems import QUIET, classes, network
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fedsim
from fedsim.engine.assignments import Plan
from fedsim.engine.base import SerialEngine
from fedsim.engine.worker import Worker
from fedsim.task.layout import Layout

Build = Callable[[], nn.Module]


def skewed() -> list[tuple[Tensor, Tensor]]:
    """Six clients, each with one feature that is large and one class: singular vectors far from each other."""
    g = torch.Generator().manual_seed(0)
    scales = torch.eye(6) * 2.7 + 0.3
    return [(torch.randn(16, 6, generator=g) * scales[i], torch.full((16,), i % 3)) for i in range(6)]


def run(model: nn.Module, *overrides: str, clients: Any = None, **given: Any) -> fedsim.RunResult:
    few = ("engine=serial", *QUIET, "rounds=3", "clients_per_round=6", "client.lr=0.5")
    clients = clients or skewed()
    return fedsim.simulate([*few, *overrides], model=model, clients=clients, test=clients[0], **given)


def older(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(layer)


NORMS: dict[str, Build] = {
    "parametrised": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "after weight_norm": lambda: parametrizations.spectral_norm(
        parametrizations.weight_norm(nn.Linear(6, 6))
    ),
    "older": lambda: older(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_spectral_norm_of_the_averaged_weights_is_one(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[kind](), nn.ReLU(), nn.Linear(6, 3))
    layout = Layout(model)
    assert layout.buffer_dim == 0, "u and v follow from the weights: they do not travel"
    results = [run(model, f"dir={tmp_path}/{n}", "client.epochs=5", f"engine.chunks={n}") for n in (2, 3)]
    for result in results:
        model.load_state_dict(result.weights)
        with torch.no_grad():
            model.eval()(skewed()[0][0])  # the older one computes the weight here
        assert torch.linalg.matrix_norm(model[0].weight.detach(), 2) == pytest.approx(1, abs=1e-4)
    saved = load_file(results[0].dir / "weights.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in results[0].weights.items())


def test_spectral_norm_is_one_in_personal_models_and_while_measuring() -> None:
    """The loss that a run reports is that of the normalised weights; so is a personal model's."""
    seen: list[float] = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                seen.append(float(torch.linalg.matrix_norm(self[0].weight.detach(), 2)))
            return super().forward(x)

    torch.manual_seed(0)
    model = Watched(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    settings = (
        "evaluation.every=1",
        "evaluation.clients_every=1",
        "evaluation.holdout=0.25",
        "client.epochs=5",
    )
    run(model, "strategy=ditto", *settings)
    assert len(seen) > 20
    assert max(abs(s - 1) for s in seen) < 1e-4


class FrozenNorms(nn.Module):
    """BatchNorm frozen in three ways, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.by_mode, self.by_weights, self.by_train = (nn.BatchNorm1d(6) for _ in range(3))
        self.trains, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.by_mode.eval()
        self.by_weights.requires_grad_(False)
        for norm in (self.by_mode, self.by_weights, self.by_train):
            norm.running_mean.copy_(torch.linspace(0.1, 0.7, 6))
            norm.running_var.copy_(torch.linspace(0.3, 1.1, 6))

    def train(self, mode: bool = True) -> FrozenNorms:
        super().train(mode)
        self.by_train.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        assert not self.by_train.training
        for norm in (self.by_mode, self.by_weights, self.by_train, self.trains):
            x = norm(x)
        return self.head(x)


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_layers_that_are_frozen_keep_their_statistics_bit_for_bit(strategy: str) -> None:
    model = FrozenNorms()
    settings = ("evaluation.every=1", "client.batch_size=5", f"strategy={strategy}")
    found = run(model, *settings).weights
    for name in ("by_mode", "by_weights", "by_train"):
        assert torch.equal(found[f"{name}.running_mean"], torch.linspace(0.1, 0.7, 6)), name
        assert torch.equal(found[f"{name}.running_var"], torch.linspace(0.3, 1.1, 6)), name
    assert (found["trains.running_mean"].abs() > 0.01).any() == (strategy == "fedavg")
    assert model.by_mode.training is False and model.by_weights.training and model.trains.training


def test_a_model_in_evaluation_mode_as_a_whole_trains_as_a_whole() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    assert (run(model).weights["0.running_mean"].abs() > 0.01).any()


def test_masks_of_pruned_weights_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    mask = model[0].weight_mask.clone()
    found = run(
        model,
        "strategy.weighting=uniform",
        clients=[(x[: 5 + i], y[: 5 + i]) for i, (x, y) in enumerate(skewed())],
    )
    assert torch.equal(found.weights["0.weight_mask"], mask)
    assert Layout(model).buffer_dim == 0


class Stateful(nn.Module):
    """Everything at once that must not depend on who computes a client: a hidden state, weights bounded by assignment,
    a replaced buffer, spectral norm, half precision, a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.coarse, self.out = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mean", torch.zeros(4))
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.out.weight.data = torch.renorm(self.out.weight.data, 2, 0, 0.8)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        x = torch.tanh(self.coarse(self.body(x - self.mean))) * self.scale
        self.h = x.mean(0).detach() + (0 if self.h is None else 0.5 * self.h)
        return self.out(x + self.h)


@pytest.mark.slow
def test_one_worker_and_two_give_the_same_bits_as_the_serial_engine() -> None:
    torch.manual_seed(0)
    model, clients = Stateful(), classes()
    settings = ("evaluation.every=1", "evaluation.batch_size=3", "clients_per_round=5", "client.epochs=2")
    engines = (["engine=serial"], ["engine=ray", "engine.workers=1"], ["engine=ray", "engine.workers=2"])
    rows = [run(model, *settings, *engine, clients=clients).rows for engine in engines]
    for other in rows[1:]:
        for here, there in zip(rows[0], other, strict=True):
            assert all(here[k] == there[k] for k in ("weights_hash", "loss", "accuracy"))


class Fresh(SerialEngine):
    """Every call on a worker of its own: as far apart as any engine may take them."""

    def start(self, plan: Plan) -> None:
        super().start(plan)
        self._plan = plan

    def map(self, method: str, shared: Any, items: Any, costs: Any = None) -> Iterator[Any]:
        for item in items:
            yield getattr(Worker(self._plan), method)(shared, item)


RUNS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "everything": (Stateful, ()),
    "masks": (lambda: network("dropout"), ("strategy=scaffold", "strategy.option=1")),  # full gradients first
    "norms": (lambda: network("bn"), ("strategy=fedrep",)),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_worker_that_served_others_computes_what_a_fresh_one_does(kind: str, tmp_path: Path) -> None:
    build, settings = RUNS[kind]
    clients, seen = classes(), list[Any]()
    shared = (
        "evaluation.every=1",
        "evaluation.batch_size=3",
        "evaluation.clients_every=1",
        "evaluation.holdout=0.2",
    )
    for engine in (None, Fresh()):
        torch.manual_seed(0)
        config = compose_quickly(
            (
                *QUIET,
                *shared,
                *settings,
                "rounds=3",
                "clients_per_round=5",
                f"dir={tmp_path}/{len(seen)}",
                "engine=serial",
                "engine.chunks=5",
            )
        )
        result = fedsim.api.run(config, engine=engine, model=build(), clients=clients, test=clients[0])
        seen.append([[row[k] for k in ("weights_hash", "loss", "clients/loss")] for row in result.rows])
    assert seen[0] == seen[1]
