"""What macOS lacks, taken away from driver and workers: calls go through Ray and its store, with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LACKING = ("memfd_create", "sched_getaffinity", "sched_setaffinity")
TAKEN = f"""
import fcntl, os, pathlib

for name in {LACKING}:
    vars(os).pop(name, None)
vars(fcntl).pop("F_ADD_SEALS", None)
there = pathlib.Path.is_dir
pathlib.Path.is_dir = lambda self, *a, **k: str(self) != "/proc/self/fd" and there(self, *a, **k)
"""  # by sitecustomize, before anything else of a process
RUN = f"""
import json, os
import torch
import fedsim
from torch import nn


def loss(output, y):
    assert not any(hasattr(os, name) for name in {LACKING}), "a worker has what was taken away"
    return nn.functional.cross_entropy(output, y)


def network():
    model = nn.Sequential(nn.Linear(70, 1000), nn.ReLU(), nn.Linear(1000, 3))
    return model[0].requires_grad_(False) and model  # large enough to be in memory once, where that can be


clients = [(torch.randn(30, 70), torch.randint(3, (30,))) for _ in range(4)]
settings = ["rounds=2", "num_clients=4", "clients_per_round=4", "client.epochs=1", "tracker=quiet"]
rows = [
    fedsim.simulate([*settings, *engine], model=network, loss=loss, clients=clients, test=clients[0]).rows
    for engine in (["engine=serial"], ["engine=ray", "engine.workers=2"])
]
from fedsim.engine.ray.transport.memory import SUPPORTED
from fedsim.task import mapped

print(json.dumps({{"paths": [SUPPORTED, mapped.SUPPORTED], "bits": [[r["weights_hash"] for r in of] for of in rows]}}))
"""


@pytest.mark.slow
def test_without_anonymous_files_and_proc_workers_give_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TAKEN)
    (tmp_path / "run.py").write_text(RUN)
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["paths"] == [False, False], "the portable path was not taken"
    serial, workers = found["bits"]
    assert len(serial) == 2 and serial == workers
