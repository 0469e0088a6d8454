"""The table of an open world: how well seen classes are classified and unseen ones found, by method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedsim.report import prose
from fedsim.report.runs import Group
from fedsim.report.tables import html_table
from fedsim.tracking.rows import OPEN_WORLD

WORDS = (
    "Last round, %, mean ± sample standard deviation over seeds, and in brackets the mean of each run's best round, "
    "which is chosen by the test set. seen: plain accuracy. all, AU (unseen), LU (locally unseen), GU (globally "
    "unseen): ids are matched to classes one to one on that subset alone, so that AU is no mean of LU and GU, and all "
    "may lie below both seen and AU where a new class shares an id with another. NMI: normalised mutual "
    "information of unseen classes."
)


def open_table(groups: Sequence[Group]) -> str:
    """HTML; empty where every class has labels."""
    rows = []
    for group in groups:
        series = [{name: list(run.series(name).values()) for name in OPEN_WORLD} for run in group.runs]
        if any(one["all"] for one in series):
            cells = [(_cell([one[name] for one in series if one[name]]), "") for name in OPEN_WORLD]
            rows.append([(group.label, ""), *cells])
    if not rows:
        return ""
    table = html_table(["method", *OPEN_WORLD], rows, [False, *[True] * len(OPEN_WORLD)], "plain")
    return "<h3>Seen and unseen classes</h3>" + table + prose.paragraph(WORDS, "soft")


def _cell(series: Sequence[Sequence[float]]) -> str:
    if not series:
        return "–"
    last, best = [100 * one[-1] for one in series], [100 * max(one) for one in series]
    spread = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
    return f"{statistics.fmean(last):.1f}{spread} ({statistics.fmean(best):.1f})"
