"""A file of the user's that hides one of fedsim's packages is named, with the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.cli.main import command
from fedsim.config.compose import compose
from fedsim.engine.ray import cluster
from fedsim.errors import OWN, ConfigError, shadow

HIDING = [
    "strategies.py",
    "clients.py",
    "conf.py",
    "strategies/__init__.py",
    "clients/__init__.py",
    "conf/__init__.py",
]


def put(name: str) -> str:
    """The file in the working directory, and the line about it."""
    file = Path.cwd() / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    theirs = file.parent if file.name == "__init__.py" else file
    return f"the package {theirs.stem!r} of fedsim ({OWN / theirs.stem}) is hidden by {theirs}; rename {theirs.name}"


def forget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of fedsim's package has been imported yet, and the working directory comes first."""
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(Path.cwd()))


@pytest.mark.parametrize("name", HIDING)
def test_the_command_and_compose_say_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = put(name)
    forget(Path(name).parts[0].removesuffix(".py"), monkeypatch)
    assert shadow() == line
    assert command(["rounds=1"]) == 2
    assert capsys.readouterr().err == f"fedsim: {line}\n"
    with pytest.raises(ConfigError) as caught:
        compose([])
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["clients/alice.csv", "conf/my.yaml", "strategy.py", "strategies.yaml"])
def test_what_hides_nothing_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(name)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert shadow() is None and shadow(Path.cwd()) is None


@pytest.mark.parametrize("name", [*HIDING, "fedsim.py", "fedsim/__init__.py"])
def test_ray_says_it_before_its_workers_look_there(name: str) -> None:
    line = put(name)
    with pytest.raises(ConfigError) as caught:
        cluster.connect(None)
    assert str(caught.value) == line
    assert shadow(OWN) is None


def test_a_script_is_told_at_the_import() -> None:
    line = put("strategies.py")
    code = f"import sys; sys.path.insert(0, {str(Path.cwd())!r})\nimport fedsim"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == f"ImportError: {line}"
