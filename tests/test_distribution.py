"""The built distributions: what is in them, that both are one, that the wheel runs, and that tags are versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fedsim

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out), *flags]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


def test_the_version_is_one_everywhere() -> None:
    version = PROJECT["version"]
    assert fedsim.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version in headings and headings[0] in ("Unreleased", version)
    lowest = PROJECT["requires-python"].removeprefix(">=")
    said = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert said[0] == lowest and said == sorted(said)


@pytest.mark.nightly
def test_wheel_and_source_distribution_are_one_and_the_wheel_runs(tmp_path: Path) -> None:
    assert build(ROOT, tmp_path).returncode == 0
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    assert build(unpacked, tmp_path / "again", "-t", "wheel").returncode == 0
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(tmp_path / "again" / wheel.name) as second:
        names = first.namelist()
        assert sorted(names) == sorted(second.namelist())
        same = [name for name in names if not name.endswith("/RECORD")]  # which lists them in their order
        assert all(first.read(name) == second.read(name) for name in same)
    for package in ("fedsim", "strategies", "clients"):
        assert f"{package}/py.typed" in names
    assert "conf/config.yaml" in names and "fedsim/commit.txt" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "fedsim",
        "strategies",
        "clients",
        "conf",
    }
    place = tmp_path / "installed"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
        str(wheel),
    ]
    subprocess.run([sys.executable, *install], check=True)
    run = ["-m", "fedsim.cli", "experiment=quickstart", "rounds=2", "engine=serial", "dir=run"]
    subprocess.run(
        [sys.executable, *run], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(place)}, check=True
    )
    assert '"done"' in (tmp_path / "run/summary.json").read_text()


@pytest.mark.nightly
def test_a_tag_that_is_not_the_version_is_not_built(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    copy = tmp_path / "copy"
    subprocess.run([*git, "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(copy)], check=True)
    subprocess.run([*git, "-C", str(copy), "tag", "v99.0.0"], check=True)
    done = build(copy, tmp_path / "out", "-t", "wheel")
    assert done.returncode and "v99.0.0" in done.stderr + done.stdout
    subprocess.run([*git, "-C", str(copy), "tag", f"v{PROJECT['version']}"], check=True)
    assert build(copy, tmp_path / "out", "-t", "wheel").returncode == 0
