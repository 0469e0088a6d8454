"""Who leads in which column of a report's table: by verdicts, or by value where nothing is drawn by chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedsim.report.arms import Arm
from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.runs import Run
from fedsim.report.verdict import BETTER, judge, pair

TOTALS = {"megabytes": ("bytes_up", "bytes_down"), "seconds": ("seconds",), "sim_seconds": ("sim_seconds",)}
TOTALS |= {"joules": ("joules",)}
EXACT = ("megabytes", "sim_seconds", "joules")  # ranked by value: nothing in them is drawn by chance alone
FULL, TIE = "best", "tie"  # marks of leaders
GREY = "grey"  # of what is shown, but ranked by nobody


def marks_of(
    blocks: Sequence[ProblemBlock],
    arms: Sequence[tuple[int, Arm]],
    plan: ComparisonPlan,
    target: float | None,
    timed: bool,
) -> dict[str, dict[int, str]]:
    """Marks by column and row: of the objective by verdicts, of what is exact by value, of rounds by verdicts."""
    out: dict[str, dict[int, str]] = {plan.objective.column: {}}
    for at, block in enumerate(blocks):
        rows = {row: arm for row, (where, arm) in enumerate(arms) if where == at}
        mark = FULL if len(block.stars) == 1 else TIE
        out[plan.objective.column] |= {row: mark for row, arm in rows.items() if arm.name in block.stars}
        for column in (*EXACT, *(["seconds"] if timed else [])):
            ranked = column != "seconds" or quiet(block)
            marks = _least(rows, TOTALS[column]) if ranked else dict.fromkeys(rows, GREY)
            out.setdefault(column, {}).update(marks)
        out.setdefault("rounds_to_target", {}).update(_fastest(rows, target))
    return out


def _least(rows: dict[int, Arm], parts: Sequence[str]) -> dict[int, str]:
    """Rows of the least total, unless all are equal."""
    totals = {
        row: statistics.fmean([sum(run.total(part) for part in parts) for run in arm.runs.values()])
        for row, arm in rows.items()
        if not arm.excluded
    }
    least = min(totals.values(), default=math.nan)
    leaders = [row for row, total in totals.items() if total == least]
    return {} if len(leaders) == len(totals) else dict.fromkeys(leaders, FULL)


def _fastest(rows: dict[int, Arm], target: float | None) -> dict[int, str]:
    """The row that is certainly the first at the target, among those of which every seed gets there."""
    found = {row: {seed: first(run, target) for seed, run in arm.runs.items()} for row, arm in rows.items()}
    there = {row: at for row, at in found.items() if at and None not in at.values()}
    if len(there) < 2 or len(found) != len(rows):
        return {}
    rounds = {row: {seed: float(one[0]) for seed, one in at.items() if one} for row, at in there.items()}
    gap = max(one[1] for at in there.values() for one in at.values() if one)
    lead = min(rounds, key=lambda row: statistics.fmean(list(rounds[row].values())))
    others = [row for row in rounds if row != lead]
    family = [
        pair(("", rounds[lead]), ("", rounds[row]), sign=-1, floor=gap / math.sqrt(6)) for row in others
    ]
    return {lead: FULL} if all(c.verdict == BETTER for c in judge(family)) else {}


def quiet(block: ProblemBlock) -> bool:
    """Whether all runs of a block were timed alike, on machines with cores to spare."""
    facts = [run.facts for arm in block.ranked for run in arm.runs.values()]
    same = {
        tuple(fact.get(k) for k in ("host.class", "engine.name", "engine.workers", "threads"))
        for fact in facts
    }
    if len(same) != 1 or None in next(iter(same))[:1]:
        return False
    loads = [
        (fact.get(f"load.{when}"), fact.get("host.cores")) for fact in facts for when in ("start", "end")
    ]
    return all(load is not None and cores is not None and load < cores for load, cores in loads)


def first(run: Run, target: float | None) -> tuple[int, int] | None:
    """The first evaluated round with an accuracy at or above ``target``, and the rounds since the evaluation before."""
    before = 0
    for at, value in run.series("accuracy").items() if target is not None else ():
        if target is not None and value >= target:
            return at, at - before
        before = at
    return None
