"""The number of a run: which column, over which of its last rounds, and whether more or less of it is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, check_choice, hint
from fedsim.tracking.rows import OPEN_WORLD, read_rows

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl

PLACES = ("test", "val", "clients", "clients_val")
VALIDATION = {"test": "val", "val": "val", "clients": "clients_val", "clients_val": "clients_val"}
OVER_CLIENTS = ("mean", "weighted", "worst_tenth")
DIRECTIONS = ("auto", "max", "min")
COSTS = (  # endings: less is better
    *("loss", "error", "seconds", "bytes", "joules", "bytes_up", "bytes_down", "error_rate"),
    *("perplexity", "perplexity_pooled", "mae", "mse", "nll", "cross_entropy"),
)
SHARES = ("accuracy", "precision", "recall", "f1", "jaccard", "iou")  # endings: in 0..1, shown in percent
GAPS = ("participation_gap", "out_of_sample_gap")  # seen minus unseen, GAP/METRIC of others than accuracy
SPREADS = ("_std", "_variance", "_gini", "_angle", "_kl")  # over clients, behind a metric: less is better
OF_SOME = ("_weighted", "_worst_tenth", "_best_tenth", "_worst")  # other values of the metric before them
BEST_VAL = "best_val"
HUGE = 1e150  # a loss beyond it has diverged, and its square would be infinite: not finite


@dataclass(frozen=True)
class Number:
    """What a run is worth."""

    value: float  # NaN where there is none, and where a row that it is made of is not finite
    rounds: tuple[int, ...]  # whose rows it is made of; their number is the K' of ``mean:K``
    missing: str = ""  # why there is none

    @property
    def finite(self) -> bool:
        """Whether there is a finite number."""
        return math.isfinite(self.value)


@dataclass(frozen=True)
class Objective:
    """``metric`` measured ``on`` samples, ``at`` some of the last rounds. Of accuracies also see :attr:`share`.

    ``on``: ``test`` (the column of that name as it is), ``val``, ``clients`` (each client's own test set) or
    ``clients_val``. ``at``: ``last``, ``mean:K`` of the last K evaluations, or ``best_val``: the round with the best
    validation value of the same metric. ``clients``: how clients' accuracies come to one number.
    """

    metric: str = "accuracy"
    on: str = "test"
    at: str = "mean:10"
    direction: str = "auto"
    clients: str = "mean"

    def __post_init__(self) -> None:
        check_choice("objective.on", self.on, PLACES)
        check_choice("objective.direction", self.direction, DIRECTIONS)
        check_choice("objective.clients", self.clients, OVER_CLIENTS)
        if not self.metric:
            raise ConfigError("objective.metric: empty; type a column of metrics.jsonl, such as accuracy")
        if self.at not in ("last", BEST_VAL) and self._k(self.at) is None:
            raise ConfigError(
                f"objective.at={self.at}: choose last, mean:K (K from 1, as in mean:10), or best_val"
                + ("; the best round of the test set is no result" if self.at.startswith("best") else "")
            )

    @classmethod
    def parse(cls, words: str, **others: str) -> Objective:
        """From ``accuracy``, ``clients/accuracy``, ``val/loss``, ``clients/accuracy_worst_tenth``."""
        place, slash, metric = words.partition("/")
        where = {"on": place, "metric": metric} if slash and place in PLACES else {"metric": words}
        if where.get("on", "").startswith("clients"):
            for how in OVER_CLIENTS[1:]:
                if metric.endswith(f"_{how}"):
                    where |= {"metric": metric.removesuffix(f"_{how}"), "clients": how}
        return cls(**(where | others))

    @classmethod
    def of(cls, config: Mapping[str, Any], on: str) -> Objective:
        """As a run's settings say (node ``objective``), on ``on`` where they do not say on what."""
        node = dict(config.get("objective") or {})
        known = {field.name: node[field.name] for field in fields(cls) if node.get(field.name) is not None}
        return cls(**({"on": on} | known))

    @property
    def column(self) -> str:
        """Its column of ``metrics.jsonl``."""
        return self._column(self.on)

    @property
    def validation(self) -> Objective:
        """The same of validation data."""
        return replace(self, on=VALIDATION[self.on])

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        if self.direction == "auto":
            return -1 if _less_is_better(self.metric.lower()) else 1
        return 1 if self.direction == "max" else -1

    @property
    def share(self) -> bool:
        """Whether it is a share of samples, in 0..1."""
        name = self.metric.rpartition("/")[2]
        return name in OPEN_WORLD or _without(name.lower(), OF_SOME).endswith(SHARES)

    @property
    def k(self) -> int:
        """The K of ``mean:K``; 1 of the others."""
        return self._k(self.at) or 1

    def __str__(self) -> str:
        """``accuracy on test, mean of the last 10 evaluations``."""
        where = {"clients": "clients' own test samples", "clients_val": "clients' own validation samples"}
        when = {
            "last": "last evaluation",
            BEST_VAL: f"at the best {self._column(VALIDATION[self.on])}",
        }.get(self.at, f"mean of the last {self.k} evaluations")
        over = f", {self.clients.replace('_', ' ')} over them" if self.on.startswith("clients") else ""
        return f"{self.metric} on {where.get(self.on, self.on)}{over}, {when}"

    def said(self, used: Iterable[int]) -> str:
        """The same where ``mean:K`` is made of ``used`` evaluations, for runs that have fewer than 4K."""
        counts = sorted(set(used))
        if not self.at.startswith("mean") or not counts or counts == [self.k]:
            return str(self)
        listed, plural = " or ".join(map(str, counts)), "s" if counts != [1] else ""
        fewer = f"last {listed} evaluation{plural} (runs have fewer than {4 * self.k})"
        return str(self).replace(f"last {self.k} evaluations", fewer)

    def number(self, rows: Rows) -> Number:
        """The number of the run with these rows, those of unfinished ones as far as they go."""
        column = self.column
        measured = [row for row in rows if row.get(column) is not None]
        if not measured:
            return Number(math.nan, (), f"{column} was not measured")
        if self.at == BEST_VAL:
            return self._at_best(measured)
        count = min(self.k, max(1, len(measured) // 4)) if len(measured) < 4 * self.k else self.k
        used = measured[-count:]
        values = [_float(row[column]) for row in used]
        value = math.fsum(values) / count if all(map(math.isfinite, values)) else math.nan
        return Number(value, tuple(int(row["round"]) for row in used))

    def _at_best(self, measured: Rows) -> Number:
        guide = self._column(VALIDATION[self.on])
        scored = [(row, self.sign * _float(row[guide])) for row in measured if row.get(guide) is not None]
        if not scored:
            key = "evaluation.validation" if VALIDATION[self.on] == "val" else "evaluation.client_validation"
            return Number(math.nan, (), f"objective.at=best_val: {guide} was not measured; type {key}=0.1")
        known = [(row, score) for row, score in scored if math.isfinite(score)]
        if not known:
            return Number(math.nan, (int(scored[-1][0]["round"]),))
        best = max(known, key=lambda pair: pair[1])[0]  # the earliest of equals
        value = _float(best[self.column])
        return Number(value if math.isfinite(value) else math.nan, (int(best["round"]),))

    def _column(self, on: str) -> str:
        if on == "test":
            return self.metric
        over = "" if self.clients == "mean" or on == "val" else f"_{self.clients}"
        return f"{on}/{self.metric}{over}"

    @staticmethod
    def _k(at: str) -> int | None:
        word, _, count = at.partition(":")
        return int(count) if word == "mean" and count.isdecimal() and int(count) > 0 else None


MEASURED_BY = {  # settings with which a run has columns of a place
    "clients": "evaluation.holdout=0.2 evaluation.clients_every=10",
    "val": "evaluation.validation=0.1",
    "clients_val": "evaluation.client_validation=0.1",
}


def number_of(folder: str | Path, objective: Objective) -> Number:
    """The number of the run in ``folder``."""
    path = Path(folder) / "metrics.jsonl"
    return objective.number(read_rows(path)) if path.is_file() else Number(math.nan, (), "no metrics.jsonl")


def check_column(objective: Objective, histories: Sequence[Rows]) -> None:
    """Refuse an objective that no run has measured.

    Raises:
        ConfigError: naming the nearest column that there is.
    """
    names = dict.fromkeys(
        name
        for rows in histories
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "round"
    )
    if objective.column not in names:
        place = objective.column.partition("/")[0]
        unmeasured = place in MEASURED_BY and not any(name.startswith(f"{place}/") for name in names)
        more = f"; runs with {MEASURED_BY[place]} do" if unmeasured else hint(objective.column, list(names))
        raise ConfigError(f"objective {objective.column}: no run has measured it{more}")
    if objective.metric in GAPS and objective.direction == "auto" and "clients/accuracy" not in names:
        others = [name for name in names if name.startswith(f"{objective.metric}/")]
        raise ConfigError(
            f"objective {objective.column}: here it is of another metric than accuracy, so that more or less may be "
            f"better; type {' or '.join([*others, '--direction'])}"
        )


def _less_is_better(name: str) -> bool:
    """Of losses and costs, of spreads of whatever metric, and of gaps unless they are of such: on unseen samples a loss
    is larger, so its gap is below zero."""
    first, _, rest = name.partition("/")
    if first in GAPS:
        return not _less_is_better(rest)
    metric = _without(name, SPREADS)
    spread = metric != name and metric.endswith((*COSTS, *SHARES))
    return spread or _without(name, OF_SOME).endswith(COSTS)


def _without(name: str, endings: Sequence[str]) -> str:
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), name)


def _float(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) < HUGE else math.nan
