"""What runs spent of privacy, and what an audit of them could show, by method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from statistics import median

from fedsim.report import prose
from fedsim.report.runs import Group, Run
from fedsim.report.spent import no_bound, spent
from fedsim.report.tables import html_table

HEADER = ("method", "protects", "against", "epsilon", "delta", "z", "noise", "audit: at least", "remarks")
RELATIONS = {"add_remove": "one more or less", "zero_out": "one left out", "replace_one": "one replaced"}
PROTECTS = {"client": "a client", "local": "a client, from the server too", "record": "a sample"}
WORDS = (
    "Epsilon as accounted, the most of any seed, at the delta beside it; against: what the two data sets differ in. "
    "fedsim audit RUN bounds epsilon from below by canaries and leaves its bound here, the median over seeds: a claim "
    "below it is broken. Nothing shown is no proof."
)


def budget_table(groups: Sequence[Group]) -> str:
    """HTML; empty where no run has a budget."""
    rows = [row for group in groups if (row := _row(group))]
    if not rows:
        return ""
    numeric = [name in ("epsilon", "delta", "z", "audit: at least") for name in HEADER]
    table = html_table(HEADER, [[(cell, "") for cell in row] for row in rows], numeric, "plain")
    return "<h3>Privacy</h3>" + table + prose.paragraph(WORDS, "soft")


def _row(group: Group) -> list[str]:
    there = [one for run in group.runs if (one := spent(run)) and one.get("epsilon") is not None]
    if not there:
        return []
    most = max(there, key=lambda one: float(one["epsilon"]))
    bounds = [bound for run in group.runs if (bound := audited(run)) is not None]
    shown = f"{median(bounds):.3g}" if bounds else "-"
    remarks = [f"no bound: {why}"] if (why := no_bound(group.runs)) else []
    if not most.get("private", True):
        remarks.append("keyed noise: no protection")
    if bounds and median(bounds) > float(most["epsilon"]):
        remarks.append("the claim is broken")
    level = str(most.get("level") or (group.flat.get("privacy.level", "")))
    return [
        group.label,
        PROTECTS.get(level, level),
        RELATIONS.get(str(most.get("relation")), "-"),
        f"{float(most['epsilon']):.3g}",
        f"{float(most['delta']):g}",
        f"{float(most['z']):.4g}",
        str(most.get("noise") or group.flat.get("privacy.noise", "")),
        shown,
        "; ".join(remarks),
    ]


def audited(run: Run) -> float | None:
    """The bound on epsilon that ``fedsim audit`` left in the run's folder."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return float(json.loads((run.dir / "audit.json").read_text(encoding="utf-8"))["epsilon"])
    return None
