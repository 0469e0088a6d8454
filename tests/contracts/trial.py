"""Trying a contract on the strategies of ``registry.py``."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hooks import hooked
from problems import Problem, Recorded, classification, of_strategy, recorded
from registry import CLOSE, COHORTS, METHODS, SPREAD, Entry, broad, mostly, often

import fedsim

every_method = pytest.mark.parametrize("entry", mostly(METHODS), ids=lambda e: e.label)
each_method = pytest.mark.parametrize(
    "entry", mostly(e for e in METHODS if e in COHORTS), ids=lambda e: e.label
)
each_strategy = pytest.mark.parametrize("entry", mostly(COHORTS), ids=lambda e: e.label)
spread_methods = pytest.mark.parametrize("entry", often(METHODS, *SPREAD), ids=lambda e: e.label)
spread_cohorts = pytest.mark.parametrize(
    "entry", often([e for e in METHODS if e in COHORTS], *SPREAD), ids=lambda e: e.label
)


def in_ways(name: str, *ways: object) -> pytest.MarkDecorator:
    """Every strategy in the first of ``ways``, some in all of them."""
    pairs = [
        pytest.param(e, way, id=f"{e.label}-{way}", marks=[pytest.mark.nightly] if e.label in CLOSE else [])
        for e, way in broad(*ways)
    ]
    return pytest.mark.parametrize(("entry", name), pairs)


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
