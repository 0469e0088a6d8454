"""What code looks up beside itself counts too: variables of the environment, and what it finds by a constant name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsim.config.code import Reader, digest


def made(source: str) -> Any:
    """``thing`` of the source, run as a notebook runs a cell: there is no file."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec", dont_inherit=True), space)
    return space["thing"]


ENVIRONMENT = """
import os
from os import environ as held, getenv
KEY = "FEDSIM_TEST_RATE"
"""


@pytest.mark.parametrize(
    "body",
    [
        "os.environ['FEDSIM_TEST_RATE']",
        "os.environ.get('FEDSIM_TEST_RATE', 1)",
        "os.getenv(KEY)",
        "held['FEDSIM_TEST_RATE']",
        "(lambda: getenv(KEY))()",
    ],
)
def test_variables_of_the_environment_with_constant_names_count(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thing = made(f"{ENVIRONMENT}def thing(x): return {body}")
    here = digest("", thing)
    monkeypatch.setenv("FEDSIM_TEST_OTHER", "1")
    assert digest("", thing) == here
    monkeypatch.setenv("FEDSIM_TEST_RATE", "1")
    reader = Reader("")
    assert reader.read(thing) != here and reader.environment["FEDSIM_TEST_RATE"] == "1"


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the user's beside the one that uses it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside.py").write_text("scale = 2\nunused = 3\ndef f(x): return x * scale\n")
    yield importlib.import_module("beside")
    del sys.modules["beside"]


@pytest.mark.parametrize("body", ["getattr(beside, 'f')(x)", "importlib.import_module('beside').f(x)"])
def test_what_is_looked_up_by_a_constant_name_counts(beside: ModuleType, body: str) -> None:
    thing = made(f"import beside, importlib\ndef thing(x): return {body}")
    here = digest("", thing)
    beside.unused = 4
    assert digest("", thing) == here
    beside.scale = 5
    assert digest("", thing) != here
    space = made("RATE = 1\ndef thing(x): return x * globals()['RATE']")
    here, space.__globals__["RATE"] = digest("", space), 2
    assert digest("", space) != here
