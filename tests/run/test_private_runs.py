"""Whole runs with noise: reference runs, a budget that ends, resuming, empty cohorts, single samples."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, Problem, Quadratic, classes, linear_loss, network

import fedsim
from clients.sgd import SGDClient
from fedsim.errors import CheckpointError
from fedsim.exchange import accounting
from fedsim.exchange import normals as noise
from fedsim.exchange.payload import Update
from fedsim.exchange.turns import Turns
from fedsim.local import sample_noise as records
from fedsim.local.job import Job
from fedsim.replay.claims import claim
from fedsim.task.layout import Layout
from fedsim.task.vectors import FlatModel
from strategies.fedavg import FedAvg

CLIENT = ("privacy=client", "strategy.weighting=uniform", "privacy.delta=1e-2")


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"release/{name}.npz") as file:
        return dict(file)


def little(**more: Any) -> Problem:
    return Problem(network(), classes(), ("rounds=4", "clients_per_round=2", "client.steps=2"), **more)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((), "w"),
        (("privacy.clip=adaptive", "privacy.adaptive.start=0.5", "privacy.adaptive.noise=1.5"), "w_adaptive"),
        (("privacy.mechanism=banded", "privacy.band=4"), "w_band4"),
    ],
)
def test_golden_runs(
    settings: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twelve clients, eight rounds of which one has nobody, with the reference's noise."""
    z = golden("dpfedavg")

    def keyed(seed: int, purpose: str, *numbers: int) -> noise.Normals:
        row = z["bit_noise"][numbers[0] : numbers[0] + 1] if "bits" in purpose else z["noise"][numbers[0]]
        return lambda n: torch.from_numpy(row[:n].copy())

    monkeypatch.setattr(noise, "keyed", keyed)
    monkeypatch.setattr(Turns, "check", lambda *_: None)  # these cohorts come back too early for a band
    gram = np.einsum("nij,nik->njk", z["A"], z["A"])
    pull = np.einsum("nij,ni->nj", z["A"], z["b"])
    seen: list[np.ndarray] = []
    run = Problem(
        Quadratic(5),
        [(torch.tensor(a)[None], torch.tensor(b)[None]) for a, b in zip(gram, pull, strict=True)],
        (
            "dtype=float64",
            f"rounds={len(z['take'])}",
            f"client.lr={float(z['lr'])}",
            f"client.steps={int(z['K'])}",
        ),
        loss=linear_loss,
        cohorts=[np.flatnonzero(row).tolist() for row in z["take"]],
    )

    class Watcher:
        def round(self, info: Any) -> None:
            seen.append(info.models["global"].w[:5].numpy().copy())

    run.run(
        *CLIENT, f"privacy.z={float(z['z'])}", f"privacy.clip={float(z['C'])}", "clients_per_round=3", *settings,
        f"dir={tmp_path / 'run'}", callbacks=[Watcher()],
    )  # fmt: skip
    np.testing.assert_allclose(np.array(seen), z[wanted], atol=1e-10)


def test_a_budget_ends_the_run(tmp_path: Path) -> None:
    """The last row is within it, one more round would not be; nobody's answer in a round is no reason to be silent."""
    result = little().run(
        *CLIENT,
        "participation=bernoulli",
        "rounds=30",
        "clients_per_round=1",
        "privacy.z=1",
        "privacy.epsilon_max=3",
        f"dir={tmp_path / 'r'}",
    )
    rows = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    spent = [row["epsilon"] for row in rows]
    ledger = [json.loads(line) for line in (result.dir / "privacy.jsonl").read_text().splitlines()]
    assert spent == sorted(spent) and spent[-1] <= 3 < spent[-1] + (spent[-1] - spent[-2])
    assert result.summary["stopped"] == "privacy budget" and result.summary["status"] == "done"
    assert result.summary["privacy"]["relation"] == "add_remove" and len(ledger) == len(rows) < 30
    one = claim(result.dir)
    assert one is not None and (one.epsilon, one.delta, one.relation) == (spent[-1], 1e-2, "add_remove")
    q1 = accounting.gaussian_epsilon(2 * math.sqrt(len(rows)), 1e-2)  # had everybody been asked
    assert one.binds is not None and one.epsilon < one.binds < q1  # of one sample that is in or out
    empty = [row for row in rows if not row["cohort"]]
    assert empty and all(row["noise_norm"] > 0 and row["sum_norm"] == 0 for row in empty)
    assert len({row["weights_hash"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    "settings",
    [
        ("participation=bernoulli", "privacy.clip=adaptive", "privacy.adaptive.noise=2", "privacy.z=1"),
        ("sampling=round_robin", "privacy.mechanism=banded", "privacy.epsilon=8", "rounds=4"),
        ("privacy=local", "privacy.z=2"),
    ],
)
def test_a_run_goes_on_with_the_same_bits(settings: tuple[str, ...], tmp_path: Path) -> None:
    whole = little().run(*CLIENT, *settings, f"dir={tmp_path / 'whole'}")

    class Stop:
        def round(self, info: Any) -> None:
            if info.round == 2:
                raise KeyboardInterrupt

    again = [*CLIENT, *settings, f"dir={tmp_path / 'parts'}", "checkpoint.every=1"]
    with pytest.raises(KeyboardInterrupt):
        little().run(*again, callbacks=[Stop()])
    rest = little().run(*again)
    assert rest.summary["weights_hash"] == whole.summary["weights_hash"]
    assert rest.summary["privacy"] == whole.summary["privacy"]


def test_a_lost_ledger_is_found_out(tmp_path: Path) -> None:
    common = [*CLIENT, "privacy.z=1", "participation=bernoulli", f"dir={tmp_path / 'r'}"]
    little().run(*common, "rounds=2")
    (tmp_path / "r/privacy.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"privacy.jsonl knows of 0 releases, the checkpoint of 2"):
        little().run(*common, "rounds=4")


def test_sum_and_mean_of_a_vector_share_their_noise() -> None:
    """FedDyn reads both: two draws would average the noise away."""
    from fedsim.exchange.payload import Replies

    seen: list[Replies] = []
    from strategies.feddyn import FedDyn

    class Watched(FedDyn):
        def update(self, state: Any, replies: Replies, round: Any) -> Any:
            seen.append(replies)
            return super().update(state, replies, round)

    little().run(
        *CLIENT[::2],
        "privacy.z=1",
        strategy=Watched(beta=0.0, dual_mean="all", weighting="uniform", alpha=0.1),
    )
    for replies in seen:
        torch.testing.assert_close(replies.mean("delta") * 2, replies.total("delta"))


def test_golden_gradients_of_samples() -> None:
    """Those of each sample, clipped, with noise: the reference's, which Opacus' are."""
    z = golden("dpsgd")
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p, name in zip(model.parameters(), ("W1", "b1", "W2", "b2"), strict=True):
            p.copy_(torch.from_numpy(z[name]))
    flat = FlatModel(model, torch.float64)
    g, _ = records.sample_gradients(flat, torch.nn.functional.cross_entropy)(
        flat.w, torch.from_numpy(z["X"]), torch.from_numpy(z["y"])
    )
    each = flat.layout.compact(g)
    np.testing.assert_allclose(each.numpy(), z["sample_grads"], atol=1e-12)
    total = records.clipped_sum(each, float(z["C"])) + float(z["z"] * z["C"]) * torch.from_numpy(z["noise"])
    np.testing.assert_allclose((total / float(z["expected"])).numpy(), z["gradient"], atol=1e-12)


class Remembering(SGDClient):
    """Keeps its last update, and sees at its next turn that nobody shortened that one."""

    def init_state(self, layout: Layout) -> dict[str, torch.Tensor]:
        return {"last": torch.ones(layout.dim)}

    def finish(self, job: Job, w: torch.Tensor) -> Update:
        assert float(job.state["last"].norm()) > 0.05
        update = super().finish(job, w)
        return replace(update, state={"last": update.arrays["delta"]})


def test_what_a_client_keeps_of_its_update_is_not_clipped() -> None:
    method = FedAvg(server_lr=1.0, weighting="uniform")
    method.client = Remembering(weighting="uniform")
    words = (
        "privacy=client",
        "privacy.z=1",
        "privacy.delta=1e-2",
        "privacy.clip=1e-3",
        "clients_per_round=4",
    )
    assert little().run(*words, "client.lr=1", strategy=method).rows[-1]["clipped"] == 1.0


def by_autograd(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A backward pass for each sample."""
    rows = []
    for one in range(len(y)):
        loss = torch.nn.functional.cross_entropy(model(x[one : one + 1]), y[one : one + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def by_opacus(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Opacus' hooks; with the mean it would multiply by the number of samples."""
    wrapped = pytest.importorskip("opacus").GradSampleModule(model, loss_reduction="sum")
    torch.nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
    return torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)


@pytest.mark.parametrize("reference", [by_autograd, by_opacus])
def test_gradients_of_samples_are_those_of_others(reference: Any) -> None:
    """Of a convolution with GroupNorm too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Tanh(), torch.nn.Flatten())
        model = torch.nn.Sequential(*layers, torch.nn.Linear(36, 3)).double()
        x, y = torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.randint(3, (6,))
    expected = reference(copy.deepcopy(model), x, y)
    flat = FlatModel(model, torch.float64)
    g, _ = records.sample_gradients(flat, torch.nn.functional.cross_entropy)(flat.w, x, y)
    torch.testing.assert_close(flat.layout.compact(g), expected, rtol=0, atol=1e-10)


def test_record_level_runs(tmp_path: Path) -> None:
    """The noise that epsilon asks for is kept, whatever the micro-batches; an empty batch steps by noise."""
    found = [
        little().run(
            "privacy=record",
            "privacy.delta=1e-2",
            "privacy.epsilon=4",
            f"privacy.micro={micro}",
            f"dir={tmp_path / str(micro)}",
        )
        for micro in (1, 64)
    ]
    assert 3 < found[0].summary["privacy"]["epsilon"] <= 4
    weights = [r.weights for r in found]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-5)


def test_the_core_runs_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    accounting.library.cache_clear()
    with pytest.raises(fedsim.errors.ConfigError, match=r"fedsim-lab\[privacy\]"):
        little().run(*CLIENT, "privacy.epsilon=1")


def test_noise_of_200_rounds_has_mean_zero_and_the_deviation_of_the_budget() -> None:
    """Updates are zero, so the model walks by noise alone: std zC/E an entry, no matter who was there."""
    seen: list[torch.Tensor] = []

    class Watcher:
        def round(self, info: Any) -> None:
            seen.append(info.models["global"].w.double().clone())

    settings = (*CLIENT, "privacy.z=1.5", "privacy.clip=0.2", "participation=bernoulli", "client.lr=1e-30")
    run = Problem(
        network(), classes(), ("rounds=200", "clients_per_round=2", "client.steps=1", "dtype=float64")
    )
    run.run(*settings, callbacks=[Watcher()])
    steps = torch.stack(seen).diff(dim=0)
    steps = steps[:, steps.abs().sum(0) > 0]  # without padding
    deviation = 1.5 * 0.2 / 2
    assert steps.shape == (199, 43) and float(steps.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(steps.mean())) < 4 * deviation / steps.numel() ** 0.5
    spread = steps.mean(0) / (deviation / 199**0.5)
    assert float(spread.abs().max()) < 4
