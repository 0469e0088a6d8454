"""Models that clients handed over once: how many samples each was trained on, and how good it is, in a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedsim.report import prose
from fedsim.report.runs import Group, Run
from fedsim.report.tables import html_table

HEADER = ("methods", "client", "model", "samples", "accuracy on them", "on own tests")
MOST = 100  # models of one run that are shown
WORDS = (
    "Each client's own model as it was handed over, from the first run of each method; methods in one row began with "
    "the same. In percent, of the samples that it was trained on, and of its client's own tests (evaluation.holdout)."
)


def models_table(groups: Sequence[Group]) -> str:
    """HTML; empty where no run asked for models."""
    found: dict[str, tuple[list[str], list[Mapping[str, Any]]]] = {}
    for group in groups:
        index = next(filter(None, map(_index, group.runs)), None)
        if index is not None:
            methods, _ = found.setdefault(index["uploads_hash"], ([], index["clients"]))
            methods.append(group.label)
    rows = [
        [(cell, "") for cell in _cells(methods, line)]
        for methods, lines in found.values()
        for line in lines[:MOST]
    ]
    if not rows:
        return ""
    left = sum(max(0, len(lines) - MOST) for _, lines in found.values())
    words = f"{WORDS} {left} more models are in uploads/uploads.json." if left else WORDS
    numeric = [name not in ("methods", "model") for name in HEADER]
    table = html_table(HEADER, rows, numeric, "plain")
    return "<h3>Models that clients handed over</h3>" + table + prose.paragraph(words, "soft")


def _index(run: Run) -> dict[str, Any] | None:
    """What the run's folder says of its models, if it is whole."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        found: dict[str, Any] = json.loads((run.dir / "uploads" / "uploads.json").read_text(encoding="utf-8"))
        for line in found["clients"]:
            _cells([str(found["uploads_hash"])], line)
        return found
    return None


def _cells(methods: Sequence[str], line: Mapping[str, Any]) -> list[str]:
    own = [line.get(name) for name in ("train_accuracy", "own_test_accuracy")]
    shown = ["-" if value is None else f"{100 * float(value):.1f}" for value in own]
    return [
        ", ".join(methods),
        str(line["client"]),
        str(line["architecture"]),
        f"{float(line['samples']):g}",
        *shown,
    ]
