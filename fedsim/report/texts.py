"""Samples of text in the report, from ``texts.json`` of the runs: how each method goes on where a sample ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedsim.report import prose
from fedsim.report.runs import Group
from fedsim.report.tables import html_table

FILE = "texts.json"  # in a run folder, with evaluation.texts=N
WORDS = (
    "Test samples are broken off in the middle; the final global models go on, drawing at temperature 0.7. Of each "
    "method the run with the lowest seed."
)


def text_table(groups: Sequence[Group]) -> str:
    """HTML; empty where no run has samples of text."""
    found: dict[str, list[Any]] = {}
    for group in groups:
        run = min(group.runs, key=lambda r: r.seed)
        if (file := run.dir / FILE).is_file():
            found[group.label] = json.loads(file.read_text())
    if not found:
        return ""
    first = next(iter(found.values()))
    head = ["given", "true", *found]
    rows = []
    for i, sample in enumerate(first):
        own = [
            texts[i] if i < len(texts) and texts[i]["given"] == sample["given"] else {}
            for texts in found.values()
        ]
        rows.append(
            [(t, "") for t in (sample["given"], sample["true"], *(o.get("written", "–") for o in own))]
        )
    table = html_table(head, rows, [False] * len(head), "plain")
    return "<h3>Samples of text</h3>" + table + prose.paragraph(WORDS, "soft")
