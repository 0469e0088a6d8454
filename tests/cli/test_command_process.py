"""The command in a process of its own, and what the wheel holds for it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python process that has not been prepared yet."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def fedsim(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command, in its own process."""
    return python("-m", "fedsim.cli", *argv, cwd=cwd)


def test_process_errors_and_flags(tmp_path: Path) -> None:
    bad = fedsim("strategy.rhoo=1", "strategy=fedspeed", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "fedsim: unknown key 'strategy.rhoo'; nearest is 'strategy.rho'\n"
    shown = fedsim("--cfg", "job", "--package", "client", "client.lr=0.25", cwd=tmp_path)
    assert shown.returncode == 0 and "lr: 0.25" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_process_restarts_itself_for_malloc_and_stays_light(tmp_path: Path) -> None:
    code = (
        "import os, sys, fedsim.cli.main as c; c._prepare_process(); c.command(['--help']);"
        "print(os.environ['MALLOC_TRIM_THRESHOLD_'], {'torch', 'ray', 'pandas'} & set(sys.modules))"
    )
    run = python("-c", code, cwd=tmp_path)
    assert run.stdout.splitlines()[-1] == "4294967296 set()", run.stderr


@pytest.mark.slow
def test_a_real_run_is_verified_and_resumed_by_the_same_command(tmp_path: Path) -> None:
    argv = ["engine=serial", "rounds=2", "dir=here", "client.epochs=1"]
    first = fedsim(*argv, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "results: here" in first.stdout and "curves:  here/curves.png" in first.stdout
    assert "already done, skipped: here" in fedsim(*argv, cwd=tmp_path).stdout
    assert fedsim("verify", "here", cwd=tmp_path).stdout.endswith("2 rounds identical\n")
    other = fedsim(*argv, "seed=1", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.startswith("fedsim: "), (
        "another run's folder is not touched"
    )
    unknown = fedsim(*argv, "+strategy.foo=1", "resume=never", cwd=tmp_path)
    assert unknown.returncode == 2 and "foo" in unknown.stderr and "Traceback" not in unknown.stderr


@pytest.mark.nightly
def test_wheel_holds_the_configuration_tree(tmp_path: Path) -> None:
    options = ["--no-deps", "--wheel-dir", str(tmp_path)]
    python("-m", "pip", "wheel", str(ROOT), *options, cwd=tmp_path).check_returncode()
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"{package}/py.typed" for package in ("fedsim", "strategies", "clients")}
    assert expected | {"fedsim/report/page.html"} <= names
