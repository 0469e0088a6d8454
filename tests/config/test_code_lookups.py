"""What code looks up by names that stand in it is part of its digest: the environment, modules, globals."""

from __future__ import annotations

from types import ModuleType

import pytest
from test_code import made, module  # noqa: F401 - a fixture

from fedsim.config.code import Reader, digest

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


@pytest.mark.parametrize("body", ["getattr(beside, 'f')(x)", "importlib.import_module('beside').f(x)"])
def test_what_is_looked_up_by_a_constant_name_counts(
    module: ModuleType,  # noqa: F811
    body: str,
) -> None:
    thing = made(f"import beside, importlib\ndef thing(x): return {body}")
    here = digest("", thing)
    module.unused = 4
    assert digest("", thing) == here
    module.scale = 5
    assert digest("", thing) != here
    space = made("RATE = 1\ndef thing(x): return x * globals()['RATE']")
    here, space.__globals__["RATE"] = digest("", space), 2
    assert digest("", space) != here
