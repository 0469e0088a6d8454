"""The table of a report as numbers: one row an arm, in full precision. How it is shown: ``tables`` and ``latex``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsim.errors import ConfigError, hint
from fedsim.report import tuned
from fedsim.report.arms import Arm
from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.comparison import differing_words, footer, objective_words, ranges
from fedsim.report.marks import TOTALS, first, marks_of, quiet
from fedsim.report.objective import Objective
from fedsim.report.runs import Run, column_order
from fedsim.report.spent import DELTA, EPSILON, no_bound, spent_most
from fedsim.report.verdict import UNDECIDED, Comparison

if TYPE_CHECKING:
    import pandas as pd

TO_TARGET = ("rounds_to_target", "time_to_target")
BEST_TEST = "best_test"
DEFAULT = ("difference", "verdict", *TO_TARGET, EPSILON, DELTA, "megabytes", "sim_seconds", "joules")
WHERE_THERE = ("note", "sim_seconds", "time_to_target", "joules", EPSILON, DELTA)  # else no column
COLUMNS = (*DEFAULT, "seconds", BEST_TEST)  # and every column of metrics.jsonl
TOGETHER = {  # what a column's words are made of
    "difference": ("difference", "low", "high", "p_holm"),
    "verdict": ("p_holm", "verdict", "needed"),
    "rounds_to_target": ("rounds_to_target", "reached", "resolution"),
}


@dataclass(frozen=True)
class Shown:
    """What a table shows beside method, settings and the objective."""

    target: float | None = None  # accuracy in 0..1 whose first crossing is reported
    columns: tuple[str, ...] = ()  # in place of ``DEFAULT``, in this order


def frame_of(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, shown: Shown) -> pd.DataFrame:
    """A row per arm with numbers, block after block. ``frame.attrs`` holds what a table says beside them.

    ``blocks``: the block of each row; ``stars``: marks by column and row; ``below``: lines on arms without a row, on
    notes and on leaders that are not decided; ``objective``, ``plan``, ``target``.
    """
    import pandas as pd

    arms = [(at, arm) for at, block in enumerate(blocks) for arm in block.ranked]
    keys = dict.fromkeys(
        key
        for block in blocks
        for key in (*block.setting.differing, *(k for arm in block.setting.arms for k in arm.group.settings))
    )
    settings = sorted(keys, key=column_order)
    extra = _extra(blocks, plan, shown)
    lines = [_line(blocks[at], arm, plan, shown, settings, extra) for at, arm in arms]
    columns = list(lines[0]) if lines else ["method", "n", plan.objective.column]
    frame = pd.DataFrame(lines, columns=columns, dtype=object)
    if lines:
        numbers = [
            c for c in frame if c not in {*settings, "method", "seeds", "verdict", "note", "n", "reached"}
        ]
        frame = frame.astype(dict.fromkeys(numbers, float))
    for column in [c for c in WHERE_THERE if c in frame]:
        values = frame[column]
        if not (values.astype(bool) & values.notna()).any():
            frame = frame.drop(columns=column)
    if lines and shown.columns:
        frame = frame[_as_asked(list(frame), plan.objective.column, shown.columns)]
    stars = marks_of(blocks, arms, plan, shown.target, "seconds" in shown.columns)
    frame.attrs |= {
        "target": shown.target,
        "objective": plan.objective,
        "plan": plan,
        "extra": [name for name, _ in extra],
        "blocks": [at for at, _ in arms],
        "stars": {column: marks for column, marks in stars.items() if marks},
        "below": [
            *([_numbers_are(blocks, plan)] if lines else []),
            *_all_below(blocks, plan, shown),
            *tuned.said(blocks),
            *(f"{column}: no run has it" for column in shown.columns if column not in frame),
        ],
    }
    return frame


def _as_asked(there: Sequence[str], objective: str, asked: Sequence[str]) -> list[str]:
    """Columns as far as the objective's, then those asked for in their order, then the notes."""
    first = there[: there.index(f"{objective}_std") + 1]
    wanted = [c for name in asked for c in TOGETHER.get(name, (name, f"{name}_std")) if c in there]
    return list(dict.fromkeys([*first, *wanted, *(c for c in there if c == "note")]))


def _extra(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, shown: Shown) -> list[tuple[str, Objective]]:
    """Further columns of ``metrics.jsonl``, summarised as the objective is: asked for, or the worst clients' own."""
    runs = [run for block in blocks for arm in block.setting.arms for run in arm.group.runs]
    there = dict.fromkeys(name for run in runs for row in run.rows[-1:] for name in row)
    there |= dict.fromkeys(name for run in runs for row in run.rows for name in row)
    if not shown.columns:
        worst = f"clients/{plan.objective.metric}_worst_tenth"
        names = [worst] if plan.objective.on == "clients" and worst in there else []
    else:
        names = [name for name in shown.columns if name not in COLUMNS]
        for name in names:
            if name not in there:
                raise ConfigError(f"--columns {name}: no such column{hint(name, [*COLUMNS, *there])}")
    return [(name, Objective(name, at=plan.objective.at.replace("best_val", "last"))) for name in names]


def _line(
    block: ProblemBlock,
    arm: Arm,
    plan: ComparisonPlan,
    shown: Shown,
    settings: Sequence[str],
    extra: Sequence[tuple[str, Objective]],
) -> dict[str, Any]:
    runs = list(arm.runs.values())
    values = [value for value in arm.values.values() if math.isfinite(value)]
    name = plan.objective.column
    known = {**block.setting.differing, **arm.group.settings}
    line: dict[str, Any] = {
        "method": arm.group.method,
        **{key: known.get(key) for key in settings},
        "n": len(values),
        "seeds": ",".join(str(seed) for seed in arm.values),
        name: _mean(values),
        f"{name}_std": _std(values),
    }
    for column, objective in extra:
        found = [number.value for run in runs if not (number := objective.number(run.rows)).missing]
        line |= {column: _mean(found), f"{column}_std": _std(found)}
    wanted = shown.columns or DEFAULT
    if BEST_TEST in wanted:
        best = [max(all_) for run in runs if (all_ := _finite(run.series(plan.objective.metric)))]
        line |= {BEST_TEST: _mean(best), f"{BEST_TEST}_std": _std(best)}
    if {"difference", "verdict"} & set(wanted):
        line |= _against(next((c for c in block.comparisons if c.a == arm.name), None))
    if set(TO_TARGET) & set(wanted):
        line |= _to_target(runs, shown.target)
    line |= {column: value for column, value in spent_most(runs).items() if column in wanted}
    line |= {
        column: _mean([sum(run.total(part) for part in parts) for run in runs])
        / (1e6 if column == "megabytes" else 1)
        for column, parts in TOTALS.items()
        if column in wanted
    }
    return line | {"note": "; ".join(_notes(arm))}


def _against(c: Comparison | None) -> dict[str, Any]:
    if c is None:
        return {
            "difference": math.nan,
            "low": math.nan,
            "high": math.nan,
            "p_holm": math.nan,
            "verdict": "",
            "needed": math.nan,
        }
    needed = math.nan if c.seeds_needed is None else c.seeds_needed
    return {
        "difference": c.mean,
        "low": c.low,
        "high": c.high,
        "p_holm": c.p_holm,
        "verdict": c.verdict,
        "needed": needed,
    }


def _to_target(runs: Sequence[Run], target: float | None) -> dict[str, Any]:
    """Mean first round at or above the target, how many runs reach it, and the rounds between evaluations there."""
    firsts = [(run, found) for run in runs if (found := first(run, target)) is not None]
    return {
        "rounds_to_target": _mean([at for _, (at, _) in firsts]),
        "reached": len(firsts),
        "resolution": max((gap for _, (_, gap) in firsts), default=math.nan),
        "time_to_target": _mean([run.total("sim_seconds", at) for run, (at, _) in firsts if _timed(run)]),
    }


def _timed(run: Run) -> bool:
    return any(row.get("sim_seconds") is not None for row in run.rows)


def _notes(arm: Arm) -> list[str]:
    out = list(arm.notes)
    if arm.excluded:
        reasons = "; ".join(f"seed {seed} {reason}" for seed, reason in sorted(arm.excluded))
        out.append(f"{len(arm.values)} of {len(arm.values) + len(arm.excluded)} seeds; {reasons}")
    if why := no_bound(list(arm.runs.values())):
        out.append(f"epsilon is no bound: {why}")
    lost = [seed for seed, value in arm.values.items() if not math.isfinite(value)]
    if lost:
        out.append(f"not finite: {len(lost)} of {len(arm.values)} seeds ({ranges(sorted(lost))})")
    return out


def _numbers_are(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> str:
    words = objective_words(blocks, plan)
    return f"{words}: mean ± sample standard deviation over n seeds"


def _all_below(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, shown: Shown) -> list[str]:
    """Lines under the table; of several blocks each with what tells its block apart, or once if all say the same."""
    lines = [(block, line) for block in blocks for line in _below(block, plan, shown)]
    if len(blocks) == 1:
        return [line for _, line in lines]
    counts = Counter(line for _, line in lines)
    reasons = [
        line if counts[line] == len(blocks) else f"{differing_words(block)}: {line}" for block, line in lines
    ]
    return list(dict.fromkeys(reasons))


def _below(block: ProblemBlock, plan: ComparisonPlan, shown: Shown) -> list[str]:
    """Lines under the table, of one block."""
    out = []
    for arm in block.setting.arms:
        if arm in block.ranked:
            continue
        ended = "; ".join(f"seed {seed} {reason}" for seed, reason in sorted(arm.excluded))
        out.append(f"{arm.name}: not in the table: {'; '.join(filter(None, (arm.unranked, ended)))}")
    if block.undecided:
        out.append(block.undecided)
    compared = [line for line in footer(block, plan) if line.startswith("paired")]
    busy = (
        ["seconds: not ranked: busy or different machines"] if _shows_unranked_seconds([block], shown) else []
    )
    return out + compared + busy


def _shows_unranked_seconds(blocks: Sequence[ProblemBlock], shown: Shown) -> bool:
    return "seconds" in shown.columns and not all(quiet(block) for block in blocks)


def verdict_words(verdict: str, needed: float) -> str:
    """``undecided (~16 seeds)``."""
    if verdict != UNDECIDED or math.isnan(needed):
        return verdict
    return f"{verdict} ({'> 100' if needed > 100 else f'~{needed:g}'} seeds)"


def _finite(series: dict[int, float]) -> list[float]:
    return [value for value in series.values() if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN where there is none."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
