"""How many cores this process may use. Imports neither torch nor Ray."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fedsim.errors import ConfigError

MANY = 128  # workers, or threads of one, that any machine may have, of however few cores
PROC, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may run on (taskset, Slurm), at most its control group's quota (docker), rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def check_number(setting: str, wanted: int, zero: str = "") -> None:
    """Refuse more workers, or threads of one, than this machine could hold open, or would ever compute with.

    Raises:
        ConfigError: naming ``setting`` and the number of cores; ``zero``: what 0 means, if it may be typed.
    """
    cores = available_cores()
    if wanted > max(MANY, 8 * cores):
        raise ConfigError(
            f"{setting}={wanted}: this process may use {cores} core{'s' if cores > 1 else ''}, and more "
            f"{setting.rpartition('.')[2]} are not faster; type {setting}={cores}{zero}"
        )


def _quota() -> float:
    """CPU seconds a second that the control groups of this process allow; infinite without a limit."""
    try:
        groups = [line.split(":", 2) for line in PROC.read_text().splitlines()]
    except OSError:
        return math.inf
    quotas = [math.inf]
    for _, controllers, path in groups:
        if not controllers:
            roots, read = [CGROUPS], _quota_v2
        elif "cpu" in controllers.split(","):
            roots, read = [CGROUPS / controllers, CGROUPS / "cpu"], _quota_v1
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            # In a container the path may be the host's; its own group is then what is mounted at the root.
            for place in {root, folder, *(p for p in folder.parents if root in p.parents)}:
                try:
                    quotas.append(read(place))
                except (OSError, ValueError):
                    continue
    return min(quotas)


def _quota_v2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota / period if quota > 0 else math.inf
