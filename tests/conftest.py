"""Shared by all tests: one torch thread, run folders in a temporary place, quick configuration, at most one Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composing import compose_quickly

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join([str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYTHONPATH"] = PATHS  # worker and child processes run this tree's code
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored where a script started pytest in the background


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without ``dir`` go to ``./runs``: let that be a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``simulate`` composes its configuration quickly."""
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)


@pytest.fixture(scope="session")
def ray() -> Iterator[str]:
    """The override that selects the Ray engine; Ray starts with the first test that asks and ends with the last."""
    from fedsim.engine.ray import cluster

    try:
        yield "engine=ray"
    finally:
        cluster.shutdown()
