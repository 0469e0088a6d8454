"""Contract: a finished run that is asked for more rounds ends as one that was asked for them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from composing import compose_quickly
from problems import classification, hashes
from registry import BROAD, Entry
from trial import spread_methods

from fedsim.errors import CheckpointError
from fedsim.run.key import horizon
from fedsim.tracking import read_rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock on the wall says."""
    return [{k: v for k, v in row.items() if k != "seconds" and not isinstance(v, dict)} for row in rows]


@spread_methods
def test_two_rounds_and_then_two_more_are_four(entry: Entry, tmp_path: Path) -> None:
    problem, settings = classification(), [*entry.arguments, "evaluation.every=1"]
    if horizon(
        compose_quickly(entry.arguments)
    ):  # its schedule spans the run: with more rounds it is another run
        problem.run(*settings, f"dir={tmp_path}", "rounds=2")
        with pytest.raises(CheckpointError, match="it differs in rounds"):
            problem.run(*settings, f"dir={tmp_path}", "rounds=4")
        return
    straight = problem.run(*settings, f"dir={tmp_path / 'straight'}", "rounds=4")
    for way in ("extended", "killed") if entry.label in BROAD else ("extended",):
        place = f"dir={tmp_path / way}"
        problem.run(*settings, place, "rounds=2")
        if way == "killed":
            with pytest.raises(KeyboardInterrupt):
                problem.run(*settings, place, "rounds=4", callbacks=[Interrupt(3)])
        longer = problem.run(*settings, place, "rounds=4")
        assert hashes(longer) == hashes(straight)
        assert compared(longer.rows) == compared(straight.rows)
        assert all(torch.equal(longer.weights[k], v) for k, v in straight.weights.items())
        one, other = (read_rows(tmp_path / name / "clients.jsonl") for name in (way, "straight"))
        assert [r for r in one if not r["metric"].endswith("seconds")] == [
            r for r in other if not r["metric"].endswith("seconds")
        ]
