"""From run folders to tables and curves. Reads files only; pandas and matplotlib are imported when needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsim.runs import Group, Run, column_order, group_runs, load_runs, short_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console

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

# Which end of a column leads.
_BEST = {
    "accuracy": max,
    "best": max,
    "rounds_to_target": min,
    "megabytes": min,
    "seconds": min,
    "sim_seconds": min,
}


def compare(runs: Sequence[Run], target: float | None = None) -> pd.DataFrame:
    """One row per group of runs that differ only in their seed; numbers are means over the seeds.

    Columns: ``method``, the settings in which the groups differ, ``seeds``, ``accuracy`` and ``best`` (of
    the last evaluated round and of the best one, in 0..1) each with its sample standard deviation
    ``..._std`` (NaN for one seed), ``rounds_to_target`` (first evaluated round at or above ``target``, over
    the seeds that reach it; NaN if none does) with their number ``reached``, ``megabytes`` (up and down,
    10^6 bytes), ``seconds`` (real) and, if a clock was simulated, ``sim_seconds``. ``note`` names runs
    that diverged or are not done, if there are any.

    ``target``: default is ``evaluation.target`` of the runs if they agree on one, else
    :func:`default_target`. It is kept in ``frame.attrs["target"]``.
    """
    import pandas as pd

    target = _configured_target(runs) if target is None else target
    target = default_target(runs) if target is None else target
    groups = group_runs(runs)
    columns = sorted({key for group in groups for key in group.settings}, key=column_order)
    frame = pd.DataFrame([_line(group, columns, target) for group in groups], dtype=object)
    numbers = [column for column in frame if column in _BEST or column.endswith("_std")]
    frame = frame.astype(dict.fromkeys(numbers, float))
    for column in ("note", "sim_seconds"):
        if column in frame and not frame[column].any():
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
    from fedsim.curves import draw

    return draw(histories)


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print what :func:`compare` returned, accuracies in percent.

    The best value of a column is bold and starred; groups with a note are no candidates; the notes follow
    the table. A table wider than the terminal keeps its digits and runs over the edge.
    """
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table

    target = frame.attrs.get("target")
    names = {
        "accuracy": "final %",
        "best": "best %",
        "megabytes": "MB",
        "seconds": "s",
        "sim_seconds": "sim. s",
    }
    names["rounds_to_target"] = "to target" if target is None else f"to {100 * target:g}%"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [
        column for column in frame.columns if column not in ("accuracy_std", "best_std", "reached", "note")
    ]
    for column in shown:
        justify: Literal["right", "left"] = "right" if column in _BEST else "left"
        table.add_column(names.get(column, short_name(column)), justify=justify, no_wrap=True)
    done = frame[frame["note"] == ""] if "note" in frame else frame
    best = {column: _best(list(done[column]), pick) for column, pick in _BEST.items() if column in frame}
    for row in frame.to_dict("records"):
        leads = [not row.get("note") and row[c] == best.get(c, math.nan) for c in shown]
        cells = (_cell(row, column) for column in shown)
        table.add_row(*(f"[bold green]{c} *[/]" if lead else c for c, lead in zip(cells, leads, strict=True)))
    console = console or RichConsole()
    needed = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    table.width = needed if needed > console.width else None
    console.print(table, crop=False)
    for row in frame.to_dict("records"):
        if row.get("note"):
            console.print(f"{row['method']} (seeds {row['seeds']}): {row['note']}", style="yellow")


def _best(values: Sequence[float], pick: Any) -> float | None:
    """The leading value of a column, unless all are equal; a missing one (never reached) comes last."""
    known = _finite(values)
    return pick(known) if known and len(set(values)) > 1 else None


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if column in ("accuracy", "best"):
        std = row[f"{column}_std"]
        return f"{100 * value:.2f}" + ("" if math.isnan(std) else f" ± {100 * std:.2f}")
    if column == "rounds_to_target":
        seeds = len(str(row["seeds"]).split(","))
        mean = f"{round(value, 1):g}"
        return mean if row["reached"] == seeds else f"{mean} ({row['reached']} of {seeds} seeds)"
    if column in _BEST:
        return f"{value:.1f}"
    from rich.markup import escape

    return escape(str(value))


def _line(group: Group, columns: Sequence[str], target: float | None) -> dict[str, Any]:
    series = [list(run.series("accuracy").values()) for run in group.runs]
    final = [values[-1] for values in series if values]
    best = [max(known) for values in series if (known := _finite(values))]
    firsts = [_first(run, target) for run in group.runs]
    reached = [first for first in firsts if first is not None]
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
