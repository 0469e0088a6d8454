"""Trials of ``fedsim tune``: where the next point comes from, what each is worth, and the record of all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedsim.cli.spaces import Point, Space, Swept, described, edges, untried
from fedsim.errors import ConfigError
from fedsim.report.objective import Objective

SAMPLERS = ("grid", "optuna")
RECORD = "tune.json"


@dataclass
class Trial:
    """A point of a method's space: its runs and what they are worth on validation data, by seed."""

    point: Point
    scores: dict[int, float | None] = field(default_factory=dict)  # None: the run failed, or is not finite
    folders: dict[int, str] = field(default_factory=dict)
    reason: str | None = None  # why it has no score

    @property
    def score(self) -> float | None:
        """The mean over seeds; ``None``, which is worse than any number, if one of them has none."""
        values = list(self.scores.values())
        known = [v for v in values if v is not None]
        return math.fsum(known) / len(known) if values and len(known) == len(values) else None


class Proposer(Protocol):
    """Says which point of a space is tried next."""

    def next(self) -> Point | None:
        """The point; ``None`` if there is none left."""

    def tell(self, score: float | None) -> None:
        """What the last one was worth."""


class GridSampler:
    """The points that the budget takes, in grid order; then, if asked for more, the rest of the grid."""

    def __init__(self, space: Space, trials: int) -> None:
        self._points = self._sequence(space, trials)

    @staticmethod
    def _sequence(space: Space, trials: int) -> Iterator[Point]:
        if space.size is None:
            number = 0
            while True:
                yield space.drawn(number)
                number += 1
        yield from space.points(trials)
        yield from space.order[trials:]

    def next(self) -> Point | None:
        """See ``Proposer``."""
        return next(self._points, None)

    def tell(self, score: float | None) -> None:
        """Nothing depends on it."""


class OptunaSampler:
    """Optuna's tree-structured Parzen estimator, asked and told; its seed is fixed."""

    def __init__(self, space: Space, sign: int) -> None:
        if find_spec("optuna") is None:
            raise ConfigError("--sampler optuna needs Optuna; type: pip install 'fedsim-lab[tune]'")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._failed, self._space = optuna.trial.TrialState.FAIL, space
        direction = "maximize" if sign > 0 else "minimize"
        self._study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=0))

    def next(self) -> Point | None:
        """See ``Proposer``."""
        self._trial = self._study.ask()
        return tuple(self._suggested(axis) for axis in self._space.axes)

    def tell(self, score: float | None) -> None:
        """See ``Proposer``."""
        if score is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, score)

    def _suggested(self, axis: Swept) -> str:
        if not axis.interval:
            return str(self._trial.suggest_categorical(axis.key, list(axis.values)))
        if axis.whole:
            return str(self._trial.suggest_int(axis.key, int(axis.low), int(axis.high)))
        return f"{self._trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log):.6g}"


@dataclass
class Search:
    """A method under way: its space, its trials so far, and what became of them."""

    space: Space
    sampler: Proposer
    objective: Objective  # of validation data
    used: set[int] = field(default_factory=set)  # evaluations that scores are made of
    trials: list[Trial] = field(default_factory=list)
    exhausted: bool = False
    warnings: list[str] = field(default_factory=list)
    final: Trial | None = None  # the winner on fresh seeds

    @property
    def ranked(self) -> list[Trial]:
        """The best first; of equal ones the earlier. Those without a score come last."""
        worst = math.inf
        scored = [
            (worst if t.score is None else -self.objective.sign * t.score, i)
            for i, t in enumerate(self.trials)
        ]
        return [self.trials[i] for _, i in sorted(scored)]

    @property
    def winner(self) -> Trial | None:
        """The best trial that has a score."""
        first = self.ranked[:1]
        return first[0] if first and first[0].score is not None else None

    @property
    def unscored(self) -> int:
        """Trials that failed or are not finite."""
        return sum(trial.score is None for trial in self.trials)

    def at_edges(self) -> list[Any]:
        """The winner's settings at an edge of what was tried."""
        winner = self.winner
        return [] if winner is None else edges(self.space, winner.point, [t.point for t in self.trials])

    @property
    def untried(self) -> list[str]:
        """Lines on values that no trial had."""
        return untried(self.space, [t.point for t in self.trials])

    def score_at(self, key: str, value: str) -> float | None:
        """Score at another value of the winner's setting ``key``: with the other settings as they are, if that was
        tried, else the best."""
        winner, at = self.winner, [axis.key for axis in self.space.axes].index(key)
        assert winner is not None
        there = [t for t in self.ranked if t.point[at] == value and t.score is not None]
        same = [
            t
            for t in there
            if all(a == b for i, (a, b) in enumerate(zip(t.point, winner.point, strict=True)) if i != at)
        ]
        return next((t.score for t in (*same, *there)), None)

    def facts(self, trials: int) -> dict[str, Any]:
        """What ``tune.json`` says of the method."""
        ranks = {id(trial): rank for rank, trial in enumerate(self.ranked, start=1)}
        winner = self.winner
        return {
            "name": self.space.method,
            "objective": asdict(self.objective),
            "fixed": list(self.space.fixed),
            "grid": self.space.size,
            "budget": trials,
            "exhausted": self.exhausted,
            "unscored": self.unscored,
            "trials": [
                {
                    "trial": number,
                    "overrides": dict(described(self.space, trial.point)),
                    "scores": {str(seed): value for seed, value in trial.scores.items()},
                    "score": trial.score,
                    "rank": ranks[id(trial)],
                    "folders": {str(seed): folder for seed, folder in trial.folders.items()},
                    "reason": trial.reason,
                }
                for number, trial in enumerate(self.trials)
            ],
            "winner": None if winner is None else self.trials.index(winner),
            "edges": list(self.warnings),
            "final": {} if self.final is None else {str(s): f for s, f in self.final.folders.items()},
        }


def value_of(folder: Path, objective: Objective, rounds: int) -> tuple[float | None, str | None, int]:
    """What a run is worth after ``rounds`` rounds, ``None`` if that is not finite; why; of how many evaluations.

    Raises:
        ConfigError: if it has not measured the objective.
    """
    from fedsim.report.objective import check_column
    from fedsim.tracking.rows import read_rows

    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["round"] <= rounds]
    found = objective.number(rows)
    if found.missing:
        check_column(objective, [rows])
        raise ConfigError(f"{folder}: {found.missing}")
    used = len(found.rounds)
    return (found.value, None, used) if found.finite else (None, f"{objective.column} is not finite", used)


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """The record in one piece: the same facts are the same bytes."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text_of(facts))
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); give another out=... or name=..."
        ) from error


def text_of(facts: Mapping[str, Any]) -> str:
    """The record as JSON."""
    return json.dumps(facts, indent=1, allow_nan=False, sort_keys=True) + "\n"


def relative(folder: str | Path, root: Path) -> str:
    """A run folder as the record names it: as seen from where the record lies."""
    return os.path.relpath(folder, root)


def seeds_of(text: str, flag: str) -> tuple[int, ...]:
    """``0,1`` or ``10-14`` or both."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{flag} {text}: numbers and ranges of them, as in 0,1 or 10-14")
        found += range(int(first), int(last if dash else first) + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"{flag} {text}: a seed stands there twice")
    return tuple(found)


def overlap(tuning: Sequence[int], final: Sequence[int]) -> None:
    """Refuse to judge winners on a seed that they were chosen by."""
    if both := sorted(set(tuning) & set(final)):
        raise ConfigError(
            f"--final-seeds: {', '.join(map(str, both))} chose the winners already (--seeds); type seeds that did not, "
            f"as in --final-seeds {max(tuning) + 1}-{max(tuning) + 5}"
        )
