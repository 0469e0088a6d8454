"""What the simulator asks of a method beside its traits has a protocol: fold, statistics, aggregator, what it wraps."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clients.base import Client
from fedsim.server.traits import aggregator_of, fold_of, parts_of, statistics_of
from strategies.fedavg import FedAvg

ROOT = Path(__file__).parents[2]


def test_nothing_is_asked_of_a_method_by_name() -> None:
    asked = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in (ROOT / "fedsim").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("getattr", "hasattr")
        if ast.unparse(call.args[0]).rpartition(".")[2] in ("method", "strategy")
        if isinstance(call.args[1], ast.Constant)
    ]
    assert not asked, "give it a protocol in fedsim/server/traits.py"


def test_a_method_of_ones_own_need_not_have_a_fold_or_an_aggregator() -> None:
    bare: Any = SimpleNamespace(client=Client())
    assert (fold_of(bare), statistics_of(bare), aggregator_of(bare)) == ({}, frozenset(), None)
    outer: Any = SimpleNamespace(base=FedAvg(server_lr=1.0, weighting="uniform"))
    assert list(parts_of(outer)) == [outer, outer.base]
    assert fold_of(outer.base) == {"delta": "mean"} and aggregator_of(outer.base) is outer.base.aggregator
