"""What runs spent of privacy, and what an audit of them could show, by method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from statistics import median
from typing import Any

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
    "below it is broken, where it is of what a canary in or out is. Nothing shown is no proof."
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
    audits = [found for run in group.runs if (found := audited(run))]
    bounds = [float(one["epsilon"]) for one in audits]
    claims = [float(one["compared"]) for one in audits if one.get("compared") is not None]
    shown = f"{median(bounds):.3g}" if bounds else "-"
    remarks = [f"no bound: {why}"] if (why := no_bound(group.runs)) else []
    if not most.get("private", True):
        remarks.append("keyed noise: no protection")
    if len(claims) < len(audits):
        remarks.append("the audit's bound is held against nothing")
    elif claims:
        if any(one.get("why") for one in audits):
            remarks.append(f"the audit's bound is held against {max(claims):.3g}, of one replaced")
        if median(bounds) > max(claims):
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


def audited(run: Run) -> dict[str, Any]:
    """What ``fedsim audit`` left in the run's folder: the bound on epsilon, and what that is held against."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        found = json.loads((run.dir / "audit.json").read_text(encoding="utf-8"))
        float(found["epsilon"]), float(found.get("compared") or 0)
        return dict(found)
    return {}
