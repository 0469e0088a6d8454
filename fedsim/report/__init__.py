"""From run folders to numbers and curves. Reads files only; pandas and matplotlib are imported when needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report.runs import Group, Run, column_order, group_runs, load_runs
from fedsim.report.tables import BEST, print_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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


def compare(runs: Sequence[Run], target: float | None = None) -> pd.DataFrame:
    """One row per group of runs that differ only in their seed; numbers are means over the seeds.

    Columns: ``method``, the settings in which the groups differ, ``seeds``, ``accuracy`` and ``best`` (of
    the last evaluated round and of the best one, in 0..1) each with its sample standard deviation
    ``..._std`` (NaN for one seed), ``rounds_to_target`` (first evaluated round at or above ``target``, over
    the seeds that reach it; NaN if none does) with their number ``reached``, ``megabytes`` (up and down,
    10^6 bytes), ``seconds`` (real) and, if a clock was simulated, ``sim_seconds``, ``time_to_target`` (simulated
    seconds to the first round at or above ``target``, over the seeds that reach it) and, if powers are known,
    ``joules``. ``note`` names runs that diverged or are not done, if there are any.

    ``target``: default is ``evaluation.target`` of the runs if they agree on one, else
    :func:`default_target`. It is kept in ``frame.attrs["target"]``.
    """
    import pandas as pd

    target = _configured_target(runs) if target is None else target
    target = default_target(runs) if target is None else target
    groups = group_runs(runs)
    columns = sorted({key for group in groups for key in group.settings}, key=column_order)
    frame = pd.DataFrame([_line(group, columns, target) for group in groups], dtype=object)
    numbers = [column for column in frame if column in BEST or column.endswith("_std")]
    frame = frame.astype(dict.fromkeys(numbers, float))
    for column in ("note", "sim_seconds", "time_to_target", "joules"):
        if column in frame and (
            not frame[column].any() or (column == "time_to_target" and "sim_seconds" not in frame)
        ):
            frame = frame.drop(columns=column)
    frame.attrs["target"] = target
    return frame


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
    figure = figure_of({group.label: [run.rows for run in group.runs] for group in group_runs(runs)})
    figure.savefig(path, dpi=150)
    return figure


def figure_of(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Curves of ``{label: [rows of one seed, rows of the next, ...]}``; bands are mean ± std over seeds."""
    from fedsim.report.curves import draw

    return draw(histories)


def _line(group: Group, columns: Sequence[str], target: float | None) -> dict[str, Any]:
    series = [list(run.series("accuracy").values()) for run in group.runs]
    final = [values[-1] for values in series if values]
    best = [max(known) for values in series if (known := _finite(values))]
    firsts = [_first(run, target) for run in group.runs]
    reached = [first for first in firsts if first is not None]
    times = [
        run.total("sim_seconds", first)
        for run, first in zip(group.runs, firsts, strict=True)
        if first is not None
    ]
    return {
        "method": group.method,
        **{column: group.settings.get(column) for column in columns},
        "seeds": ",".join(str(run.seed) for run in group.runs),
        "accuracy": _mean(final),
        "accuracy_std": _std(final),
        "best": _mean(best),
        "best_std": _std(best),
        "rounds_to_target": _mean(reached),
        "reached": len(reached),
        "megabytes": _mean([(run.total("bytes_up") + run.total("bytes_down")) / 1e6 for run in group.runs]),
        "seconds": _mean([run.total("seconds") for run in group.runs]),
        "sim_seconds": _mean([run.total("sim_seconds") for run in group.runs]),
        "time_to_target": _mean(times),
        "joules": _mean([run.total("joules") for run in group.runs]),
        "note": "; ".join(text for run in group.runs if (text := _remark(run))),
    }


def _remark(run: Run) -> str:
    """What a reader must know before trusting the run's numbers."""
    if run.status != "done":
        return f"seed {run.seed} {run.status} after {len(run.rows)} rounds"
    for metric in ("loss", "accuracy"):
        for at, value in run.series(metric).items():
            if not math.isfinite(value):
                return f"seed {run.seed} diverged: {metric} {value} in round {at}"
    return ""


def _first(run: Run, target: float | None) -> int | None:
    if target is None:
        return None
    return next((at for at, value in run.series("accuracy").items() if value >= target), None)


def _configured_target(runs: Sequence[Run]) -> float | None:
    targets = {(run.config.get("evaluation") or {}).get("target") for run in runs}
    target = targets.pop() if len(targets) == 1 else None
    return None if target is None else float(target)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN where there is none."""
    if len(values) < 2 or len(_finite(values)) < len(values):
        return math.nan
    return statistics.stdev(values)
