"""One Ray for the jobs of a sweep that run in several processes."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from fedsim.cli.sweep import RaySweep
from fedsim.engine.ray import cluster


def test_ray_sweep_starts_ray_only_for_jobs_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.shutdown()  # what follows would leave a real Ray half ended
    started: list[tuple[int, int]] = []

    def head(cpus: int, store_mb: int) -> SimpleNamespace:
        started.append((cpus, store_mb))
        return SimpleNamespace(address=lambda: "1.2.3.4:5", end=lambda: None, owner=os.getpid())

    monkeypatch.setattr(cluster, "OwnRay", head)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def sweep(launcher: dict[str, int], engine: str, *task: str) -> str | None:
        config = OmegaConf.create(
            {
                "engine": {"name": engine, "workers": 3, "store_mb": 7},
                "hydra": {"launcher": launcher, "overrides": {"task": list(task)}},
            }
        )
        callback = RaySweep()
        callback.on_multirun_start(config)
        address = os.environ.get("RAY_ADDRESS")
        callback.on_multirun_end(config)
        assert "RAY_ADDRESS" not in os.environ
        return address

    assert sweep({}, "ray") is None
    assert sweep({"n_jobs": 2}, "serial") is None
    assert sweep({"n_jobs": 2}, "ray", "engine=serial") is None
    assert not started
    assert sweep({"n_jobs": 2}, "serial", "engine=serial,ray") == "1.2.3.4:5"
    assert sweep({"n_jobs": 2}, "ray") == "1.2.3.4:5"
    assert started[-1][0] >= 6 and started[-1][1] == 7
