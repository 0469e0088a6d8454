"""A run's facts for trackers, and a finished run told to trackers that were named only afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from omegaconf import DictConfig

from fedsim.config.compose import plain
from fedsim.run.key import Finished, method_name, run_name
from fedsim.tracking import Row, RunInfo, build, read_rows
from fedsim.tracking.console import ConsoleTracker
from fedsim.tracking.jsonl import JsonlTracker
from fedsim.tracking.rows import stream_rows


def describe(config: DictConfig, folder: Path, start_round: int, history: Sequence[Row] = ()) -> RunInfo:
    """The run's facts for trackers; ``history``: rows of the rounds up to ``start_round``."""
    return RunInfo(
        dir=folder,
        name=run_name(config),
        group=config.name,
        method=method_name(config),
        config=plain(config),
        rounds=config.rounds,
        start_round=start_round,
        history=history,
        tags=tuple(config.tags),
    )


def log_finished(config: DictConfig, found: Finished) -> list[str]:
    """Tell the configured trackers of a finished run, from its rows, unless they have been told; their names.

    A tracker has been told if the run folder holds what it leaves there: ``wandb/`` or ``tensorboard/``.
    """
    wanted = {
        "wandb": config.tracker.wandb.mode != "disabled",
        "tensorboard": bool(config.tracker.tensorboard),
    }
    missing = [name for name, on in wanted.items() if on and not (found.folder / name).exists()]
    if not missing:
        return []
    tracker = config.tracker.copy()
    if "wandb" not in missing:
        tracker.wandb.mode = "disabled"
    tracker.tensorboard = "tensorboard" in missing
    trackers = build(tracker)
    trackers.trackers = [t for t in trackers.trackers if not isinstance(t, ConsoleTracker | JsonlTracker)]
    trackers.start(describe(config, found.folder, 0))
    clients = _by_round(found.folder / "clients.jsonl")
    at, rows = next(clients, (0, []))
    for row in read_rows(found.folder / "metrics.jsonl"):
        while 0 < at < int(row["round"]):
            at, rows = next(clients, (0, []))
        trackers.round(row, rows if at == int(row["round"]) else [])
    trackers.end(found.summary)
    return [name for name in missing if (found.folder / name).exists()]


def _by_round(path: Path) -> Iterator[tuple[int, list[Row]]]:
    """Clients' rows, round by round; nothing if the run has none."""
    if path.is_file():
        for at, rows in groupby(stream_rows(path), key=lambda row: int(row["round"])):
            yield at, list(rows)
