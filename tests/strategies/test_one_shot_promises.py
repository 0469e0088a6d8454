"""What one-shot methods promise beyond equations: a bad client loses its say, models stay, a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classification
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

import strategies.co_boosting
from clients.ridge import moments
from strategies.analytic import ridge_solution
from strategies.distilling import passes
from strategies.ensembles import weight_gradient, weight_step

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


def test_the_models_that_came_are_what_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Statistics of BatchNorm too, which a pass in training mode would move."""
    seen: list[Any] = []
    given = strategies.co_boosting.teachers

    def noted(server: Any, uploads: Any) -> Any:
        found = given(server, uploads)
        seen.append(found.modules(server.workshop))
        return found

    monkeypatch.setattr(strategies.co_boosting, "teachers", noted)
    found = classification("bn").run(*SMALL, "strategy.b_B=1", f"dir={tmp_path}/run")
    assert len(seen) == 4 and all(models is seen[0] for models in seen)
    for client, module in enumerate(seen[0]):
        held = load_file(found.dir / "uploads" / f"{client}.safetensors")
        now = module.state_dict()
        assert all(torch.equal(now[name], value) for name, value in held.items())
        assert not any(p.requires_grad for p in module.parameters()) and not module.training


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
