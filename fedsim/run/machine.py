"""What a run is computed on and with: processor, libraries, the code's commit; and what decides whether bits agree."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedsim.run.key import version

PACKAGES = ("torch", "numpy", "ray", "flwr", "pandas")
COMMIT = "commit.txt"  # beside the package's modules, in what was built from a checkout
_ROOT = Path(__file__).parents[2]

# Where entries differ, which differences explain other bits, the likeliest first: field, and how its value is said
_TELLING = (
    ("cpu.capability", ""),
    ("versions.torch", "torch "),
    ("cpu.blas", "BLAS "),
    ("cpu.mkldnn", "mkldnn "),
    ("gpu.name", ""),
    ("gpu.driver", "driver "),
    ("gpu.flags", ""),
    ("cpu.model", ""),
    ("versions.numpy", "numpy "),
    ("fedsim.version", "fedsim "),
    ("fedsim.commit", "commit "),
    ("fedsim.clean", "a clean tree: "),
    ("versions.python", "Python "),
)


def machine(threads: int, device: str) -> dict[str, Any]:
    """Processor, libraries and code, as an entry of ``provenance.json`` says them; no name of host or user."""
    return {
        "fedsim": {"version": version(), **code()},
        "versions": versions(),
        "cpu": _cpu(),
        "threads": threads,
        "gpu": _gpu() if device.startswith("cuda") else None,
        "host": {"class": _class(), "cores": os.cpu_count()},
    }


@cache
def versions() -> dict[str, str | None]:
    """Of Python and of the libraries that compute; ``None`` where one is not installed. Imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def _status() -> subprocess.Popen[str] | None:
    """Git, asked in a process of its own for the state of the checkout that the code lies in; ``None`` elsewhere."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "status", "--porcelain=v2", "--branch", "--no-ahead-behind"]
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, close_fds=False
        )
    except OSError:  # no git here
        return None


def ask_git() -> None:
    """Let git begin; :func:`code` waits for it."""
    _status()


@cache
def code() -> Mapping[str, Any]:
    """``commit`` of the code and whether the tree was ``clean`` when first asked; both ``None`` if nothing says."""
    if (asked := _status()) is None:
        try:
            commit, state = (_ROOT / "fedsim" / COMMIT).read_text().split()
        except (OSError, ValueError):
            return {"commit": None, "clean": None}
        return {"commit": commit, "clean": state == "clean"}
    lines = asked.communicate()[0].splitlines()
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), None)
    return {
        "commit": commit,
        "clean": None if commit is None else all(line.startswith("#") for line in lines),
    }


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why two entries' runs may have other bits: the first field in which they differ; ``None`` if in none.

    ``recorded on AVX512 with torch 2.13.0, here AVX2: other bits are expected``
    """
    for field, word in _TELLING:
        one, other = _at(then, field), _at(now, field)
        if one != other:
            place = f"{_at(then, 'cpu.capability')} with torch {_at(then, 'versions.torch')}"
            was = "" if field in ("cpu.capability", "versions.torch") else f", {word}{_said(one)}"
            return f"recorded on {place}{was}, here {word}{_said(other)}: other bits are expected"
    return None


def _at(entry: Mapping[str, Any], field: str) -> Any:
    value: Any = entry
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)[:40]


@cache
def _cpu() -> dict[str, Any]:
    built = torch.__config__.show()
    kind = re.search(r"BLAS_INFO=(\w+)", built)
    named = {"mkl": r"Math Kernel Library Version (\S+)", "open": r"OpenBLAS\s+(\S+)"}
    number = re.search(named.get(kind[1] if kind else "", r"(?!)"), built)
    return {
        "model": _model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "blas": f"{kind[1] if kind else 'unknown'} {number[1] if number else ''}".strip(),
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()),
    }


def _model() -> str:
    """The processor's name, as Linux tells it."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(found, "") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


@cache
def _class() -> str:
    """Hash of processor, cores, memory in GiB, operating system and libc: equal on machines that compute alike."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = (_model(), os.cpu_count(), round(pages / 2**30), platform.system(), platform.release())
    text = "/".join(map(str, (*parts, *platform.libc_ver())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _gpu() -> dict[str, Any]:
    """Name, driver, and the flags by which kernels of other bits are chosen."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    try:
        driver = re.search(r"\d+\.\d[\d.]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    flags = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": cudnn.deterministic,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.allow_tf32": cudnn.allow_tf32,
        "matmul.allow_tf32": cuda.matmul.allow_tf32,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"name": name, "driver": driver[0] if driver else None, "cuda": torch.version.cuda, "flags": flags}
