"""One-shot methods: one exchange, models that all methods share, epochs of the server's work that resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks import Interrupt
from one_shot_settings import METHODS
from problems import GOLDEN, classification, hashes, network
from torch import Tensor, nn

import fedsim
from clients.fens import Weighing, fens_gradient, fens_logits
from clients.one_shot import parts
from fedsim.errors import ConfigError
from strategies.ensembles import uniform
from strategies.synthesis import Statistics, generator, synthesised


class Pair(nn.Module):
    """Gives logits, and something else."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.inner = make()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


def run(name: str, *overrides: str, callbacks: Any = (), **given: Any) -> fedsim.RunResult:
    options = (f"strategy={name}", *METHODS[name], "evaluation.every=1", *overrides)
    return classification(**given).run(*options, callbacks=callbacks)


@pytest.mark.parametrize("kind", ["tanh", "bn"])
def test_all_methods_start_from_the_same_models_after_one_exchange(kind: str, tmp_path: Path) -> None:
    found = {
        name: classification(kind).run(
            f"strategy={name}", *options, "rounds=2", f"out={tmp_path}", "evaluation.every=1"
        )
        for name, options in METHODS.items()
    }
    first = found["one_shot"]
    assert len({r.summary["uploads_hash"] for r in found.values()}) == 1
    assert len(list((tmp_path / "uploads").iterdir())) == 1  # asked for once, by the first
    for name, result in found.items():
        row, later = result.rows
        assert row["cohort"] == [0, 1, 2, 3, 4, 5]
        assert row["models"] == 6 and row["train_loss"] == first.rows[0]["train_loss"]
        if name != "fens":
            assert row["bytes_up"] == first.rows[0]["bytes_up"]
            assert (later["bytes_up"], later["bytes_down"], later["cohort"]) == (0, 0, [])
        for column in ("uniform", "probabilities", "vote", "best_client", "fedavg"):
            assert row[f"{column}/accuracy"] == first.rows[0][f"{column}/accuracy"]
        assert len(list((result.dir / "uploads").glob("*.safetensors"))) == 6
    assert first.rows[0]["accuracy"] == first.rows[0]["fedavg/accuracy"]


def test_another_client_is_another_line(tmp_path: Path) -> None:
    problem = classification()
    changed = [(x + 1 if i == 2 else x, y) for i, (x, y) in enumerate(problem.clients)]
    lines = []
    for clients in (problem.clients, changed):
        found = run("one_shot", "rounds=1", f"out={tmp_path}", clients=clients)
        lines.append(json.loads((found.dir / "uploads" / "uploads.json").read_text())["clients"])
    assert [a != b for a, b in zip(*lines, strict=True)] == [i == 2 for i in range(6)]


@pytest.mark.parametrize("name", ["co_boosting", "feddf", "fens"])
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    straight = run(name, f"out={tmp_path}/a")

    again = [f"dir={tmp_path}/run", f"out={tmp_path}/b", "checkpoint.every=1"]
    with pytest.raises(KeyboardInterrupt):
        run(name, *again, callbacks=[Interrupt(2)])
    del again[2:]
    resumed = run(name, *again)
    assert hashes(resumed) == hashes(straight)


def test_of_co_boosting_the_weights_and_columns(tmp_path: Path) -> None:
    found = run("co_boosting", "strategy.init_std=1", "evaluation.validation=0.2", f"out={tmp_path}")
    first, second = found.rows[:2]
    assert first["ensemble_weights"] == [1 / 6] * 6  # the first epoch has no samples of before
    steps = {abs(round(w * 60 - 10, 6)) for w in second["ensemble_weights"]}
    assert steps <= {round(0.99 * s, 6) for s in range(3)}  # mu = 0.1 / K times 0.99, on two batches
    assert any(row["ensemble_weights"] != first["ensemble_weights"] for row in found.rows)
    assert first["ensemble/entropy"] == pytest.approx(np.log(6))
    assert first["ensemble/accuracy"] == first["uniform/accuracy"]
    assert "val/best_client/accuracy" in first


def test_one_model_is_distilled_and_never_weighed(tmp_path: Path) -> None:
    found = run("co_boosting", f"out={tmp_path}", cohorts=[[1], [], [], []])
    assert [row["ensemble_weights"] for row in found.rows] == [[1.0]] * 4
    assert len(set(hashes(found))) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("strategy.batch_size=1", "must be at least 2"),
        ("strategy.samples=1", "must be at least 2"),
        ("strategy.momentum=1", "must lie in"),
        ("strategy.b_B=1", "no model of the clients has BatchNorm"),
        ("strategy.init_std=abc", "a number that is not negative"),
        ("strategy.init_std=[0.1]", "'mlp' has 2 layers"),
        ("strategy.generator=conv", r"samples are of shape \(4,\)"),
    ],
)
def test_what_co_boosting_cannot_do_is_said_before_clients_train(
    words: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run("co_boosting", words, f"out={tmp_path}")
    assert not (tmp_path / "uploads").exists()


def test_data_that_made_samples_do_not_reach_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside = [(x.clamp(0, 1), y) for x, y in classification().clients]
    for clients, said in ((inside, False), ([(x * 255, y) for x, y in inside], True)):
        caplog.clear()
        run("dense", "rounds=1", f"out={tmp_path}", clients=clients)
        assert ("samples are made in [0, 1]" in caplog.text) == said


def test_models_give_one_number_for_each_class_or_more(tmp_path: Path) -> None:
    """More outputs than classes have samples are fine; what is no logits is said before clients train."""
    for name in ("co_boosting", "fens"):
        model = partial(network, "tanh", 4, 5)
        found = run(name, "rounds=2", f"out={tmp_path}", model=model)
        assert np.isfinite(found.rows[-1]["ensemble/loss"])
    for model, said in (
        (partial(Pair, network), "gives a tuple for two samples"),
        (partial(network, "tanh", 4, 2), "gives 2 logits, and there are 3 classes"),
    ):
        with pytest.raises(ConfigError, match=said):
            run("dense", f"out={tmp_path}/b", model=model, loss=lambda output, y: output[0].sum())
    assert not (tmp_path / "b" / "uploads").exists()


def test_feddf_needs_something_to_learn_from() -> None:
    with pytest.raises(ConfigError, match=r"data\.server: FedDF learns from samples"):
        classification().run("strategy=feddf")


def test_feddf_of_equal_models_stays_where_it_is(tmp_path: Path) -> None:
    alike = [classification().clients[1]] * 3
    settings = ("clients_per_round=3", "client.shuffle=false", "client.batch_size=12", "rounds=1")
    options = ("dtype=float64", f"out={tmp_path}", "strategy.data=noise", "strategy.steps=1")
    problem = classification(clients=alike, settings=settings)
    start = problem.run("strategy=one_shot", *options[:2])
    found = problem.run("strategy=feddf", *options)
    assert found.rows[0]["server/train_loss"] == pytest.approx(0, abs=1e-15)
    assert start.rows[0]["uniform/accuracy"] == start.rows[0]["fedavg/accuracy"]


def test_fens_is_golden() -> None:
    with np.load(GOLDEN / "oneshot.npz") as z:
        f, y = torch.tensor(z["Z"]), torch.tensor(z["y"])
        theta, b = torch.full((5, 4), 1 / 5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for step in range(5):
            np.testing.assert_allclose(theta, z["fens_theta"][step], atol=1e-10)
            np.testing.assert_allclose(b, z["fens_b"][step], atol=1e-10)
            g_theta, g_b = fens_gradient(f, y, theta, b)
            theta, b = theta - 0.1 * g_theta, b - 0.1 * g_b
        np.testing.assert_allclose(theta, z["fens_theta"][5], atol=1e-10)
        np.testing.assert_allclose(fens_logits(f, theta, b), z["fens_out"], atol=1e-10)
    with torch.no_grad():
        assert torch.equal(
            Weighing(5, 4).double()(f), fens_logits(f, torch.full((5, 4), 1 / 5).double(), b * 0)
        )
        plain = f.float()
        assert torch.equal(
            Weighing(5, 4)(plain), uniform(plain)
        )  # untrained: the mean of logits, bit for bit


def test_the_proxy_part_is_no_part_of_the_rest() -> None:
    rng = torch.Generator().manual_seed(0)
    for n, kept in ((100, 10), (20, 4), (5, 2), (1, 0)):
        model, proxy = parts(n, 0.1, rng)
        assert len(proxy) == kept and sorted([*model.tolist(), *proxy.tolist()]) == list(range(n))


@pytest.mark.parametrize("shape", [(2, 7, 9), (5,)])
def test_samples_are_those_of_the_step_with_the_lowest_loss(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    net = generator("auto", 4, shape, 3, 0.5, rng)
    seen: list[tuple[float, Tensor]] = []

    def criterion(x: Tensor) -> Tensor:
        value = (x.mean() - 0.3).abs() + (0.5 if len(seen) > 2 else 0.0)
        seen.append((float(value.detach()), x.detach().clone()))
        return value

    x, low = synthesised(net, torch.randn(6, 4, generator=rng), criterion, 5, 0.1, 10.0)
    best = min(range(5), key=lambda i: seen[i][0])
    assert low == seen[best][0] and torch.equal(x, seen[best][1])
    assert x.shape == (6, *shape) and 0 <= float(x.min()) <= float(x.max()) <= 1


def test_the_distance_from_running_statistics() -> None:
    models = [nn.Sequential(nn.BatchNorm1d(3)).eval() for _ in range(2)]
    watch, x = Statistics(models), torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    with watch.watching():
        for model in models:
            model(x)
    mean, var = np.array([2.0, 2, 2]), np.array([1.0, 0, 1])
    expected = np.linalg.norm(mean - 0) + np.linalg.norm(var - 1)
    assert watch.everywhere and float(watch.loss()) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["co_boosting", "in parts", "feddf", "fens"])
def test_any_number_of_workers_gives_the_same_bits(name: str, ray: str, tmp_path: Path) -> None:
    """``in parts``: batches whose gradients through all models are computed in parts, or twice."""
    options: tuple[str, ...] = ("rounds=2", "engine.chunks=3", "evaluation.holdout=0.3")
    if name == "in parts":
        name, options = "co_boosting", (*options, "strategy.samples=700", "strategy.batch_size=350")
    serial = run(name, *options, f"out={tmp_path}/a")
    spread = run(name, *options, f"out={tmp_path}/b", ray, "engine.workers=2")
    assert hashes(spread) == hashes(serial)
    for key in (
        "accuracy",
        "ensemble/loss" if name != "feddf" else "uniform/loss",
        "fedavg/loss",
        "bytes_up",
    ):
        assert [row[key] for row in spread.rows] == [row[key] for row in serial.rows]
    assert spread.summary["uploads_hash"] == serial.summary["uploads_hash"]
    one, other = ((r.dir / "uploads" / "uploads.json").read_text() for r in (serial, spread))
    assert one == other and '"own_test_accuracy": 0' in one
