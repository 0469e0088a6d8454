"""How many cores are ours: affinity, and the quota of control groups of either version, here or in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from composing import compose_quickly

from fedsim.config.schema import RayConfig
from fedsim.engine import cores
from fedsim.engine.cores import available_cores
from fedsim.engine.ray.cluster import check_workers
from fedsim.errors import ConfigError
from fedsim.run.assembly import start_engine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 cores with no control groups yet; the folder of these is returned."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "PROC", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
    (tmp_path / "fs").mkdir()
    return tmp_path / "fs"


def groups(machine: Path, text: str, files: dict[str, str]) -> None:
    """Say which groups the process is in, and write their files."""
    (machine.parent / "cgroup").write_text(text)
    for name, content in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(content)


def test_affinity_counts_and_not_the_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert available_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # other systems have no such call
    assert available_cores() == 64


V1 = "9:cpuset:/\n4:cpu,cpuacct:/docker/1\n0::/\n"


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),
        ("0::/job/step\n", {"job/step/cpu.max": "200000 100000", "job/cpu.max": "300000 100000"}, 2),
        ("0::/../elsewhere\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "what is this"}, 8),
        (
            V1,
            {
                "cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        (
            V1,
            {
                "cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/docker/1/cpu.cfs_period_us": "20000",
            },
            3,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),  # seen from inside
    ],
)
def test_the_quota_of_the_group_and_of_those_above_it_is_a_bound(
    machine: Path, text: str, files: dict[str, str], expected: int
) -> None:
    groups(machine, text, files)
    assert available_cores() == expected


def test_far_more_workers_than_cores_are_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_workers(RayConfig(workers=128, address=None))
    check_workers(RayConfig(workers=1000, address="ray://head:10001"))
    with pytest.raises(
        ConfigError, match=r"engine.workers=1000: this process may use 8 cores.*type engine.workers=8"
    ):
        check_workers(RayConfig(workers=1000, address=None))


def test_far_more_threads_than_cores_are_refused(machine: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"engine.threads=9999: this .* 8 cores.* threads are not faster; type"
    ):
        start_engine(compose_quickly(["engine=serial", "engine.threads=9999"]))
