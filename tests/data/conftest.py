"""Fixtures of the data tests: a private cache, and the folder of real data where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDSIM_CACHE", str(cache))
    return cache


@pytest.fixture
def real() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not (REAL / name).exists():
            pytest.skip(f"no ../shared/data/{name} on this machine")
        return REAL / name

    return find


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
