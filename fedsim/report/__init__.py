"""From run folders to numbers and curves. Reads files only; pandas and matplotlib are imported when needed."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import hint
from fedsim.report.runs import Group, Run, group_runs, load_runs
from fedsim.report.tables import print_table

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedsim.report.blocks import ComparisonPlan, ProblemBlock
    from fedsim.report.objective import Objective

__all__ = [
    "Group",
    "Run",
    "compare",
    "default_target",
    "draw_curves",
    "figure_of",
    "group_runs",
    "load_runs",
    "print_table",
]


def compare(runs: Sequence[Run], target: float | None = None, **options: Any) -> pd.DataFrame:
    """One row per method and settings of each problem; numbers are means over the seeds that are finished.

    Columns: ``method``, the settings in which rows differ, ``n`` and ``seeds``, the objective (``accuracy``: the mean
    of the last ten evaluations, or of the last quarter of fewer than forty) with its sample standard deviation
    ``..._std`` over seeds, ``difference`` to the reference over common seeds with its 95 % interval (``low``,
    ``high``), ``p_holm``, ``verdict`` and the seeds that would decide (``needed``); ``rounds_to_target`` (mean first
    evaluated round at or above ``target``, over the ``reached`` runs; ``resolution``: rounds between evaluations),
    ``megabytes`` (up and down, 10^6 bytes) and, if a clock was simulated, ``sim_seconds``, ``time_to_target`` and, if
    powers are known, ``joules``. ``note`` names runs that are not finished or not finite, if there are any.

    ``target``: default is ``evaluation.target`` of the runs if they agree on one, else :func:`default_target`. It is
    kept in ``frame.attrs["target"]``. ``options``: ``plan`` (a ``blocks.ComparisonPlan``), ``columns``, and
    ``blocks`` of the same runs and plan, if they are there already.
    """
    from fedsim.report.frame import Shown, frame_of

    plan = options.get("plan") or default_plan(runs)
    blocks = options.get("blocks") or compared_blocks(runs, plan)
    return frame_of(blocks, plan, Shown(target_of(runs, target), tuple(options.get("columns") or ())))


def default_plan(runs: Sequence[Run]) -> ComparisonPlan:
    """The runs' own objective, on test data, if they agree on one; by loss where no run has an accuracy."""
    from fedsim.report.blocks import ComparisonPlan
    from fedsim.report.objective import Objective

    objectives = {Objective.of(run.config, "test") for run in runs}
    objective = replace(objectives.pop(), on="test") if len(objectives) == 1 else Objective()
    measured = {name for run in runs for row in run.rows for name in row if row[name] is not None}
    if objective.column not in measured and "loss" in measured:
        if objective.metric != Objective().metric:
            near = hint(objective.metric, sorted(measured - {"loss"}))
            log.warning("objective.metric=%s: no run has that; its loss is shown%s", objective.metric, near)
        objective = replace(objective, metric="loss", direction="auto")
    return ComparisonPlan(objective)


def clients_plan(runs: Sequence[Run], plan: ComparisonPlan) -> ComparisonPlan | None:
    """The same by clients' own test samples, if that is how some of the methods are ranked and it was measured."""
    personal = any(run.summary.get("personal") for run in runs)
    objective: Objective = replace(plan.objective, on="clients")
    measured = any(row.get(objective.column) is not None for run in runs for row in run.rows)
    return (
        replace(plan, objective=objective) if personal and measured and plan.objective.on == "test" else None
    )


def compared_blocks(
    runs: Sequence[Run], plan: ComparisonPlan, order: Sequence[str] = ()
) -> list[ProblemBlock]:
    """The runs compared, problem by problem; an objective that nobody measured leaves all of them unranked."""
    from fedsim.report.blocks import blocks_of

    return blocks_of(runs, plan, order, checked=False)


def target_of(runs: Sequence[Run], target: float | None = None) -> float | None:
    """``target``, else the configured one, else the default."""
    target = _configured_target(runs) if target is None else target
    return default_target(runs) if target is None else target


def default_target(runs: Sequence[Run]) -> float | None:
    """The accuracy that rounds are counted to when none is configured.

    It is the median over runs of the best accuracy, rounded down to a multiple of 5 % (below 5 %: of 1 %):
    at least half of the runs reach it, and one that diverged does not make it trivial. ``None`` if that is
    zero.
    """
    best = [max(values) for run in runs if (values := _finite(run.series("accuracy").values()))]
    median = statistics.median_low(best) if best else 0.0
    for step in (20, 100):  # parts of one
        if (steps := math.floor(median * step + 1e-9)) > 0:
            return steps / step
    return None


def draw_curves(runs: Sequence[Run], path: str | Path) -> Figure:
    """Write accuracy and loss against rounds to ``path`` (.png, .pdf, .svg), a curve per group."""
    from fedsim.report.curves import histories_of

    figure = figure_of(histories_of(group_runs(runs)))
    figure.savefig(path, dpi=150)
    return figure


def figure_of(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Curves of ``{label: [rows of one seed, rows of the next, ...]}``; bands are mean ± std over seeds."""
    from fedsim.report.curves import draw

    return draw(histories)


def _configured_target(runs: Sequence[Run]) -> float | None:
    targets = {(run.config.get("evaluation") or {}).get("target") for run in runs}
    target = targets.pop() if len(targets) == 1 else None
    return None if target is None else float(target)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
