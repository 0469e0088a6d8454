"""What a tracker is: it receives the run's facts and keeps or shows them; it never computes results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run that every tracker may need."""

    dir: Path
    name: str  # e.g. "fedspeed-s0-1a2b3c4d": unique in its sweep
    group: str  # the sweep this run belongs to
    method: str  # e.g. "fedspeed"
    config: Mapping[str, Any]  # resolved, plain types
    rounds: int
    start_round: int = 0  # > 0 after a resume
    history: Sequence[Row] = ()  # rows of the rounds before
    tags: Sequence[str] = field(default_factory=tuple)


class Tracker:
    """Base of all trackers; every hook is optional.

    ``row`` is the round's row of ``metrics.jsonl``: ``round`` (1-based count of finished rounds), ``loss``,
    ``accuracy``... (present on evaluated rounds), ``bytes_up``, ``bytes_down``, ``sim_seconds``, ``seconds``,
    ``cohort`` (client ids), ``failures`` (list of ``{"client", "kind", "reason"}``), ``weights_hash``.
    ``clients`` are tidy rows ``{"round", "client", "metric", "value"}``.
    """

    def start(self, run: RunInfo) -> None:
        """Before the first round. Only a ``ConfigError`` raised here stops the run."""

    def phase(self, text: str) -> None:
        """A stage before ``start`` or between rounds ("loading data", "starting 2 workers")."""

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """After each round."""

    def informed(self, info: Any) -> None:
        """After ``round``, a ``fedsim.tracking.RoundInfo``, which has models: for the user's callbacks."""

    def flush(self) -> None:
        """Before a checkpoint; an ``OSError``, naming a file, if rows so far cannot be written, stops the run."""

    def end(self, summary: Row) -> None:
        """After the last round, ``status`` "done"; or early, ``status`` "failed" or "interrupted".

        Comes once, and without a ``start`` if the run failed while it was being set up.
        """
