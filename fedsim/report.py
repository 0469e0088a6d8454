"""From run folders to tables and curves. Reads files only; pandas and matplotlib are imported when needed."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import FedsimError
from fedsim.tracking.rows import from_json, read_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console

log = logging.getLogger(__name__)

# Settings that change neither a result nor its meaning: runs that differ in them only are one run, repeated.
_NEUTRAL = re.compile(
    r"(name|out|dir|resume|tags)$|(tracker|checkpoint)\.|evaluation\.target$"
    r"|engine\.(name|workers|address|store_mb|timeout)$"
)
_INNER = re.compile(
    r"strategy\.|.*_target_$"
)  # told by the method's name, unless runs of one method differ in it


@dataclass(frozen=True)
class Run:
    """One run folder."""

    dir: Path
    method: str
    seed: int
    config: Mapping[str, Any]  # as resolved, nested
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    summary: Mapping[str, Any]  # empty while the run is under way, or if it was killed

    @property
    def status(self) -> str:
        """``done``, ``failed``, ``interrupted``, or ``unfinished`` if the run did not come to write its end."""
        return str(self.summary.get("status", "unfinished"))

    def series(self, metric: str) -> dict[int, float]:
        """Values by round, of the rounds in which ``metric`` was measured."""
        return {int(row["round"]): float(row[metric]) for row in self.rows if row.get(metric) is not None}

    def total(self, column: str) -> float:
        """Sum of a column over all rounds."""
        return math.fsum(float(row.get(column) or 0) for row in self.rows)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    method: str
    settings: Mapping[str, Any]  # the keys in which the groups at hand differ
    runs: Sequence[Run] = field(repr=False)

    @property
    def label(self) -> str:
        """``fedspeed, rho=0.1``."""
        return ", ".join([self.method, *(f"{_short(k)}={v}" for k, v in self.settings.items())])


def load_runs(dirs: Iterable[str | Path]) -> list[Run]:
    """The runs in ``dirs``: run folders, or folders that hold some at any depth.

    Folders that cannot be read, and places without a run, are named in a warning and skipped.
    """
    runs: dict[Path, Run] = {}
    for place in map(Path, dirs):
        found = False
        for folder in _run_folders(place):
            found = True
            try:
                runs.setdefault(folder.resolve(), _load(folder))
            except (FedsimError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s skipped: %s: %s", folder, type(error).__name__, error)
        if not found:
            log.warning("%s: no run folder (with metrics.jsonl) here", place)
    return list(runs.values())


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ only in their seed together, in order of method and settings.

    A nested seed (``partition.seed``) that equals the run's in every run counts as the seed too. A run
    repeated with equal settings and seed is taken once, the one with most rounds, and the others are named
    in a warning.
    """
    flat = [_settings(run) for run in runs]
    followers = {
        key
        for key in set().union(*flat)
        if key.rpartition(".")[2] == "seed"
        and all(config.get(key, run.seed) == run.seed for run, config in zip(runs, flat, strict=True))
    }
    members: dict[str, list[int]] = {}
    for index, config in enumerate(flat):
        kept = {key: value for key, value in config.items() if key not in followers}
        members.setdefault(json.dumps([runs[index].method, kept], sort_keys=True, default=str), []).append(
            index
        )
    heads = [(runs[first].method, flat[first]) for first, *_ in members.values()]
    columns = _telling(heads, followers)
    groups = []
    for (method, config), indices in zip(heads, members.values(), strict=True):
        settings = {key: config[key] for key in columns if key in config}
        groups.append(Group(method, settings, _once([runs[index] for index in indices])))
    return sorted(groups, key=lambda group: (group.method, [_sortable(v) for v in group.settings.values()]))


def compare(runs: Sequence[Run], target: float | None = None) -> pd.DataFrame:
    """One row per group of runs that differ only in their seed; numbers are means over the seeds.

    Columns: ``method``, the settings in which the groups differ, ``seeds``, ``accuracy`` and ``best`` (of
    the last evaluated round and of the best one, in 0..1) each with its sample standard deviation
    ``..._std`` (NaN for one seed), ``rounds_to_target`` (first evaluated round at or above ``target``, over
    the seeds that reach it; NaN if none does) with their number ``reached``, ``megabytes`` (up and down,
    10^6 bytes), ``seconds`` (real) and, if a clock was simulated, ``sim_seconds``. ``note`` names runs that
    are not done, if there are any.

    ``target``: default is ``evaluation.target`` of the runs if they agree on one, else
    :func:`default_target`. It is kept in ``frame.attrs["target"]``.
    """
    import pandas as pd

    target = _configured_target(runs) if target is None else target
    target = default_target(runs) if target is None else target
    frame = pd.DataFrame([_line(group, target) for group in group_runs(runs)])
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
    """Write accuracy and loss against rounds to ``path`` (PNG; or what its suffix says), a curve per group."""
    figure = figure_of({group.label: [run.rows for run in group.runs] for group in group_runs(runs)})
    figure.savefig(path, dpi=150)
    return figure


def figure_of(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Curves from rows: ``{label: [rows of seed 0, rows of seed 1, ...]}``; the band is mean ± std over seeds."""
    from fedsim.curves import draw

    return draw(histories)


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print what :func:`compare` returned; the best value of a column is bold and starred."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    target = frame.attrs.get("target")
    table = Table(title=None if target is None else f"target accuracy {100 * target:g}%")
    rounds = "rounds" if target is None else f"rounds to {100 * target:g}%"
    hidden = {"accuracy_std", "best_std", "reached"}
    names = {"rounds_to_target": rounds, "megabytes": "MB", "seconds": "s", "sim_seconds": "simulated s"}
    shown = [column for column in frame.columns if column not in hidden]
    for column in shown:
        numeric = column in _BEST
        table.add_column(
            names.get(column, _short(column)), justify="right" if numeric else "left", overflow="fold"
        )
    best = {column: _best(frame[column], pick) for column, pick in _BEST.items() if column in frame}
    for row in frame.to_dict("records"):
        cells = []
        for column in shown:
            text, leads = _cell(row, column), row[column] == best.get(column)
            cells.append(f"[bold green]{text} *[/]" if leads else text)
        table.add_row(*cells)
    (console or RichConsole()).print(table)


_BEST = {
    "accuracy": max,
    "best": max,
    "rounds_to_target": min,
    "megabytes": min,
    "seconds": min,
    "sim_seconds": min,
}


def _best(values: Iterable[float], pick: Any) -> float | None:
    """The leading value of a column, unless all are equal or there is nothing to compare."""
    known = _finite(values)
    return pick(known) if len(set(known)) > 1 else None


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if column in ("accuracy", "best"):
        std = row[f"{column}_std"]
        return f"{100 * value:.2f}" + ("" if math.isnan(std) else f" ± {100 * std:.2f}")
    if column == "rounds_to_target":
        seeds = len(str(row["seeds"]).split(","))
        return f"{value:g}" if row["reached"] == seeds else f"{value:g} ({row['reached']} of {seeds} seeds)"
    if column in _BEST:
        return f"{value:.1f}"
    from rich.markup import escape

    return escape(str(value))


def _line(group: Group, target: float | None) -> dict[str, Any]:
    series = [list(run.series("accuracy").values()) for run in group.runs]
    final = [values[-1] for values in series if values]
    best = [max(known) for values in series if (known := _finite(values))]
    firsts = [_first(run, target) for run in group.runs]
    reached = [first for first in firsts if first is not None]
    late = [run for run in group.runs if run.status != "done"]
    return {
        "method": group.method,
        **group.settings,
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
        "note": "; ".join(f"seed {run.seed} {run.status} after {len(run.rows)} rounds" for run in late),
    }


def _first(run: Run, target: float | None) -> int | None:
    if target is None:
        return None
    return next((at for at, value in run.series("accuracy").items() if value >= target), None)


def _load(folder: Path) -> Run:
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    if not isinstance(config, dict):
        raise ValueError("config.yaml holds no mapping")
    end = folder / "summary.json"
    summary = from_json(end.read_text(encoding="utf-8")) if end.exists() else {}
    plain = {str(key): value for key, value in config.items()}
    method = str(summary.get("method") or _method(folder, plain))
    return Run(folder, method, int(plain["seed"]), plain, read_rows(folder / "metrics.jsonl"), summary)


def _method(folder: Path, config: Mapping[str, Any]) -> str:
    """Of a run without summary: from ``<method>-s<seed>-<key>``, else the strategy's class."""
    if match := re.fullmatch(r"(.+)-s\d+-[0-9a-f]+", folder.name):
        return match[1]
    strategy = config.get("strategy")
    target = str(strategy.get("_target_", folder.name)) if isinstance(strategy, Mapping) else str(strategy)
    return target.rpartition(".")[2].lower()


def _run_folders(place: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(place):
        if "metrics.jsonl" in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _settings(run: Run) -> dict[str, Any]:
    flat = dict(_flatten(run.config))
    return {key: value for key, value in flat.items() if key != "seed" and not _NEUTRAL.match(key)}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _telling(heads: Sequence[tuple[str, Mapping[str, Any]]], followers: set[str]) -> list[str]:
    """The keys worth a column: they differ between groups, and what the method's name tells, within a method."""

    def differs(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
        return len({str(config[key]) for config in configs if key in config}) > 1

    everyone = [config for _, config in heads]
    keys = [key for key in dict.fromkeys(k for config in everyone for k in config) if key not in followers]
    by_method = {method: [config for name, config in heads if name == method] for method, _ in heads}
    chosen = []
    for key in keys:
        scopes = by_method.values() if _INNER.match(key) else [everyone]
        if any(differs(key, scope) for scope in scopes):
            chosen.append(key)
    rows = {json.dumps([method, [config.get(k) for k in chosen]], default=str) for method, config in heads}
    if len(rows) == len(heads):
        return chosen
    return [key for key in keys if len({str(config.get(key)) for config in everyone}) > 1]


def _once(runs: Sequence[Run]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.seed, -len(run.rows), str(run.dir))):
        if kept.setdefault(run.seed, run) is not run:
            log.warning("%s left out: %s is the same run (settings and seed)", run.dir, kept[run.seed].dir)
    return list(kept.values())


def _configured_target(runs: Sequence[Run]) -> float | None:
    targets = {(run.config.get("evaluation") or {}).get("target") for run in runs}
    target = targets.pop() if len(targets) == 1 else None
    return None if target is None else float(target)


def _short(key: str) -> str:
    """``strategy.rho`` as ``rho``; ``model._target_`` as ``model``."""
    return key.removesuffix("._target_").rpartition(".")[2]


def _sortable(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if isinstance(value, (int, float)) else (True, 0.0, str(value))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN where there is none."""
    if len(values) < 2 or len(_finite(values)) < len(values):
        return math.nan
    return statistics.stdev(values)
