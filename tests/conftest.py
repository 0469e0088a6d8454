"""Shared by all tests: one torch thread, run folders in a temporary place, quick configuration, at most one Ray."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composing import compose_quickly
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
TRACES = ROOT.parent / "shared/data/traces"
ROOMS = [str(room) for room in sorted(HERE.iterdir()) if any(room.glob("test_*.py"))]
PATHS = os.pathsep.join([str(ROOT), str(HERE), *ROOMS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYTHONPATH"] = PATHS  # worker and child processes run this tree's code
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored where a script started pytest in the background
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # a busy one is no failure


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """What a test draws without saying so, such as the weights of a model, is the same each time."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without ``dir`` go to ``./runs``: let that be a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``simulate`` composes its configuration quickly."""
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)


@pytest.fixture(autouse=True)
def _wait_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs would never use Ray's workers, which the tests are about: see ``tests/engine/test_early.py``."""
    monkeypatch.setattr("fedsim.engine.ray.cluster.early", lambda config: False)


@pytest.fixture(scope="session")
def ray() -> Iterator[str]:
    """The override that selects the Ray engine; Ray starts with the first test that asks and ends with the last."""
    from fedsim.engine.ray import cluster

    try:
        yield "engine=ray"
    finally:
        cluster.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever runs on Ray counts as slow: ``make quick`` starts none."""
    for item in items:
        if "ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def traces() -> Path:
    """The folder of real device traces."""
    if not TRACES.is_dir():
        pytest.skip(f"the device traces are not at {TRACES}")
    return TRACES


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    """Overrides for six devices: 10 samples/s but client 2, 1 kB/s down, 0.5 kB/s up, 100 ms, 2 W and 1 W."""
    rows = [f"{c},{10 if c != 2 else 1},1,0.5,100,2,1" for c in range(6)]
    text = "client,speed,down,up,latency,compute_watts,radio_watts\n" + "\n".join(rows) + "\n"
    (tmp_path / "fleet.csv").write_text(text)
    return f"system.devices.path={tmp_path / 'fleet.csv'}"
