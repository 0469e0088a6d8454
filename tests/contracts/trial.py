"""Trying a contract on the strategies of ``registry.py``."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hooks import hooked
from problems import Problem, Recorded, classification, of_strategy, recorded
from registry import COHORTS, METHODS, Entry, broad

import fedsim

every_method = pytest.mark.parametrize("entry", METHODS, ids=lambda e: e.label)
each_method = pytest.mark.parametrize("entry", [e for e in METHODS if e in COHORTS], ids=lambda e: e.label)
each_strategy = pytest.mark.parametrize("entry", COHORTS, ids=lambda e: e.label)


def in_ways(name: str, *ways: object) -> pytest.MarkDecorator:
    """Every strategy in the first of ``ways``, some in all of them."""
    pairs = broad(*ways)
    return pytest.mark.parametrize(("entry", name), pairs, ids=[f"{e.label}-{way}" for e, way in pairs])


@cache
def straight(entry: Entry, kind: str = "tanh", *overrides: str) -> fedsim.RunResult:
    """A serial run of it from beginning to end, which other runs are held against: once for all tests of a process."""
    return classification(kind).run(*entry.arguments, *overrides)


def record(entry: Entry, problem: Problem, *overrides: str) -> tuple[Recorded, Any]:
    return recorded(entry.strategy, problem, *entry.overrides, *overrides)


def run_hooked(entry: Entry, hook: Any, problem: Problem, *overrides: str) -> tuple[Recorded, Any]:
    strategy = hooked(entry.strategy, hook, *entry.overrides)
    rest = [o for o in entry.overrides if not of_strategy(o)]
    return strategy, problem.run(f"strategy={entry.strategy}", *rest, *overrides, strategy=strategy)
