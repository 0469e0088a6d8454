"""What one-shot methods promise beyond equations: a bad client loses its say, models stay, a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from problems import classification
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import strategies.co_boosting
from clients.ridge import moments
from strategies import teaching
from strategies.analytic import ridge_solution
from strategies.distilling import passes
from strategies.ensembles import weight_gradient, weight_step
from strategies.teaching import Lesson


class Noise(nn.Module):
    """Adds what it draws, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x)


SMALL = (
    "strategy=co_boosting",
    "strategy.generator=mlp",
    "strategy.samples=8",
    "strategy.batch_size=4",
    "strategy.noise=3",
    "strategy.width=5",
    "strategy.generator_steps=3",
)


@pytest.mark.parametrize("seed", range(3))
def test_a_client_with_shifted_labels_loses_its_say(seed: int) -> None:
    """Ridge classifiers of three parts of the digits, the last of labels shifted by one; the rest is the pool."""
    digits, K = load_digits(), 3
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.data / 16)[order], torch.tensor(digits.target)[order]
    models = []
    for k in range(K):
        part = slice(400 * k, 400 * (k + 1))
        labels = (y[part] + (k == K - 1)) % 10
        models.append(ridge_solution(*moments(x[part], F.one_hot(labels, 10).double()), 1.0))
    x, y = x[400 * K :], y[400 * K :]
    f = torch.stack([8 * x @ W for W in models])
    w = torch.full((K,), 1 / K, dtype=torch.float64)
    for e in range(10):
        start, rng = w, torch.Generator().manual_seed(e)
        for rows in passes(len(y), 128, rng):
            w = weight_step(w, weight_gradient(f[:, rows], w, y[rows]), 0.1 / K * 0.99**e, start)
    *others, shifted = w.tolist()
    assert shifted <= min(others) - 0.3


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Workshop and teachers of each epoch that is computed."""
    found: list[tuple[Any, Any]] = []
    given = strategies.co_boosting.teachers

    def noted(server: Any, uploads: Any) -> Any:
        found.append((server.workshop, given(server, uploads)))
        return found[-1][1]

    monkeypatch.setattr(strategies.co_boosting, "teachers", noted)
    return found


def test_the_models_that_came_are_what_they_were(seen: list[tuple[Any, Any]], tmp_path: Path) -> None:
    """Statistics of BatchNorm too, which a pass in training mode would move."""
    found = classification("bn").run(*SMALL, "strategy.b_B=1", f"dir={tmp_path}/run")
    modules = [models.modules(shop) for shop, models in seen]
    assert len(modules) == 4 and all(models is modules[0] for models in modules)
    for client, module in enumerate(modules[0]):
        held = load_file(found.dir / "uploads" / f"{client}.safetensors")
        now = module.state_dict()
        assert all(torch.equal(now[name], value) for name, value in held.items())
        assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_models_that_compute_twice_say_the_same(seen: list[tuple[Any, Any]], tmp_path: Path) -> None:
    """In place of holding what is between inputs and outputs; layers that draw too."""
    network, found = partial(problems.network, "bn", 4, 3, Noise()), []
    classification(model=network).run(*SMALL, "rounds=1", f"out={tmp_path}")
    shop, models = seen[0]
    for spare in (False, True):
        torch.manual_seed(3)
        x = torch.linspace(0, 1, 28).view(7, 4).requires_grad_()
        f = models.logits(shop, x, spare=spare)
        torch.manual_seed(4)
        found.append((f.detach(), torch.autograd.grad(f.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["sign", "l2"])
def test_a_batch_in_parts_is_taught_as_in_one(
    kind: str, seen: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None of them of one sample, which some layers do not take."""
    classification().run(*SMALL, "rounds=1", "dtype=float64", f"out={tmp_path}")
    shop, models = seen[0]
    rng = torch.Generator().manual_seed(0)
    x, u = (torch.rand(11, n, generator=rng, dtype=torch.float64) for n in (4, 3))
    w, sizes, found = torch.arange(1.0, 7), list[int](), []
    part = teaching._taught_part
    monkeypatch.setattr(teaching, "_taught_part", lambda *p: (sizes.append(len(p[3])), part(*p))[1])
    for rows in (1024, 1, 6 * 5):
        monkeypatch.setattr(teaching, "ROWS", rows)
        found.append(teaching._taught(shop, models, Lesson(x, w, u, 0.1, kind, 2.0)))
    assert sizes == [11, 3, 2, 2, 2, 2, 6, 5]
    for moved, a in found[1:]:
        torch.testing.assert_close(moved, found[0][0], rtol=0, atol=1e-13)
        torch.testing.assert_close(a, found[0][1], rtol=0, atol=1e-12)


@pytest.mark.nightly
def test_killed_within_an_epoch_the_command_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL while the server works; what was checkpointed two epochs before is enough."""
    words = [
        *(word for word in SMALL if "generator_steps" not in word),
        "model=mlp",
        "model.hidden=[8]",
        "strategy.generator_steps=40",
        "rounds=12",
        "num_clients=4",
    ]
    words += [
        "clients_per_round=4",
        "client.epochs=1",
        "checkpoint.every=3",
        "engine=serial",
        "tracker=quiet",
    ]

    def command(name: str) -> list[str]:
        place = [f"out={tmp_path / name}", f"dir={tmp_path / name / 'run'}"]
        return [sys.executable, "-m", "fedsim.cli", *words, *place]

    def rows(name: str) -> list[Any]:
        path = tmp_path / name / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    subprocess.run(command("straight"), check=True)
    process = subprocess.Popen(command("killed"))
    while len(rows("killed")) < 5 and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 5 <= len(rows("killed")) < 12
    subprocess.run(command("killed"), check=True)
    assert [r["weights_hash"] for r in rows("killed")] == [r["weights_hash"] for r in rows("straight")]
