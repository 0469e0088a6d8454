"""Nobody finds out what a method is by asking for attributes by name."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from fedsim.local.interface import ClientLike
from fedsim.server.traits import StrategyLike, Traits

ROOT = Path(__file__).parents[2]
NAMES = {f.name for f in fields(Traits)}


def asked_by_name(path: Path) -> list[str]:
    """Where a trait, or a member that every method and client has, is asked for by its name."""
    whole = NAMES | {n for p in (StrategyLike, ClientLike) for n in vars(p) if not n.startswith("_")}
    return [
        f"{path}:{call.lineno}: {call.args[1].value}"
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("getattr", "hasattr")
        and isinstance(call.args[1], ast.Constant)
        # "logits" of what a model returns, "features" of a model of the user's, "architectures" of Hugging Face's
        # configurations, "frozen" of dataclasses
        and call.args[1].value in whole - {"features", "frozen", "architectures", "logits"}
    ]


@pytest.mark.parametrize("package", ["fedsim", "strategies", "clients"])
def test_no_trait_is_asked_for_by_its_name(package: str) -> None:
    assert [found for path in (ROOT / package).rglob("*.py") for found in asked_by_name(path)] == []


def test_such_a_question_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        'a = getattr(x, "peers", False)\nb = hasattr(x, "prepare")\nc = hasattr(x, "y")'
    )
    assert [found.rpartition(" ")[2] for found in asked_by_name(tmp_path / "code.py")] == ["peers", "prepare"]
