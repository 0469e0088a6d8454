"""Run folders on disk: find them, read them, and put runs together that differ in their seed only."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.config.moved import as_today
from fedsim.config.roles import telling
from fedsim.config.yamlfile import read_recorded
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.tracking.rows import from_json, read_rows

log = logging.getLogger(__name__)

NUMBERS = ("round", "accuracy", "loss", "bytes_up", "bytes_down", "seconds", "sim_seconds", "joules")
MAX_DIGITS = 8  # of a number in a table or label: those of a search have 17
# Said by the method's name, unless runs of one method differ in it.
_NAMED = re.compile(r"(strategy|code)\.|.*_target_$")
# What clients weigh decides which objective is minimised: shown wherever the runs at hand differ in it.
_WEIGHTING = re.compile(r"strategy\.(base\.)*weighting$")
WORKED_OUT = {"privacy.found"}  # by a run from its other settings


@dataclass(frozen=True)
class Run:
    """One run folder."""

    dir: Path
    method: str
    seed: int
    config: Mapping[str, Any]  # as resolved, nested
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    summary: Mapping[str, Any]  # empty while the run is under way, or if it was killed
    until: int | None = None  # the last round that is looked at; None: whatever there is

    @property
    def status(self) -> str:
        """``done``, ``failed``, ``interrupted``, or ``unfinished`` if nothing was written at its end."""
        return str(self.summary.get("status", "unfinished"))

    def series(self, metric: str) -> dict[int, float]:
        """Values by round, of the rounds in which ``metric`` was measured."""
        return {int(row["round"]): float(row[metric]) for row in self.rows if row.get(metric) is not None}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """All settings that can change a result, under flat names, without the seed."""
        flat = flatten(telling(self.config))
        return {key: value for key, value in flat if key != "seed" and not key.startswith("hydra.")}

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What is recorded of it beside its rows: its summary, and where and with what it was computed last."""
        facts = dict(self.summary)
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            entry = json.loads((self.dir / "provenance.json").read_text(encoding="utf-8"))[-1]
            facts |= {k: v for k, v in flatten(entry) if facts.get(k) is None}
        return facts

    def total(self, column: str, until: float = math.inf) -> float:
        """Sum of a column over all rounds up to ``until``."""
        return math.fsum(float(row.get(column) or 0) for row in self.rows if int(row["round"]) <= until)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    method: str
    settings: Mapping[str, Any]  # the keys in which the groups at hand differ
    runs: Sequence[Run] = field(repr=False)
    names: Mapping[str, str] = field(default_factory=dict, repr=False)  # short names of the settings
    flat: Mapping[str, Any] = field(default_factory=dict, repr=False)  # all settings of the first run, dotted

    @property
    def label(self) -> str:
        """``fedspeed, rho=0.1``."""
        settings = (
            f"{self.names.get(k, short_name(k))}={short_value(k, v)}" for k, v in self.settings.items()
        )
        return ", ".join([self.method, *settings])


def load_runs(dirs: Iterable[str | Path]) -> list[Run]:
    """The runs in ``dirs``: run folders, or folders that hold some at any depth.

    Folders that cannot be read, and places without a run, are named in a warning and skipped.

    Raises:
        ConfigError: if no run can be read, with the first reason.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for place in map(Path, dirs):
        if not place.exists():
            problems.append(f"{place}: no such folder")
            continue
        found = False
        for folder in _run_folders(place, problems):
            found = True
            try:
                runs.setdefault(folder.resolve(), _load(folder))
            except (FedsimError, OSError, ValueError, KeyError, TypeError) as error:
                said = (
                    str(error).removeprefix(f"{folder}/") if isinstance(error, FedsimError) else repr(error)
                )
                if isinstance(error, OSError):
                    said = f"{Path(error.filename or folder).name}: cannot be read ({error.strerror})"
                problems.append(f"{folder} skipped: {said}")
        if not found:
            problems.append(f"{place}: no run folder (with metrics.jsonl) here{_only_checkpoint(place)}")
    if not runs and problems:
        raise ConfigError(problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
    for problem in problems:
        log.warning("%s", problem)
    return list(runs.values())


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ only in their seed together, in order of method and settings.

    A nested seed (``partition.seed``) that equals the run's in every run counts as the seed too. A run
    repeated with equal settings and seed is taken once, the one with most rounds, and the others are named
    in a warning.
    """
    flat = [run.settings for run in runs]
    followers = followers_of(runs, flat)
    members: dict[str, list[int]] = {}
    for index, config in enumerate(flat):
        kept = {key: value for key, value in config.items() if key not in followers}
        members.setdefault(as_key([runs[index].method, kept]), []).append(index)
    heads = [(runs[first].method, flat[first]) for first, *_ in members.values()]
    columns = _telling(heads, followers)
    names = short_names(columns)
    groups = []
    for (method, config), indices in zip(heads, members.values(), strict=True):
        settings = {key: config[key] for key in columns if key in config}
        groups.append(Group(method, settings, _once([runs[index] for index in indices]), names, config))
    return sorted(groups, key=lambda group: (group.method, [_sortable(v) for v in group.settings.values()]))


def followers_of(runs: Sequence[Run], flat: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys that follow from others: what a run works out (:data:`WORKED_OUT`), and nested seeds that equal the
    run's own in every run, whose settings are ``flat``."""
    return WORKED_OUT | {
        key
        for key in set().union(*flat)
        if key.rpartition(".")[2] == "seed"
        and all(config.get(key, run.seed) == run.seed for run, config in zip(runs, flat, strict=True))
    }


def _load(folder: Path) -> Run:
    plain = as_today(read_recorded(folder / "config.yaml"))
    if not isinstance(plain.get("seed"), int):
        raise ConfigError("config.yaml: not a run's configuration: seed is missing")
    if odd := [k for k in ("objective", "evaluation") if not isinstance(plain.get(k) or {}, Mapping)]:
        raise ConfigError(f"config.yaml: not a run's configuration: {odd[0]} is no mapping")
    end = folder / "summary.json"
    try:
        summary = from_json(end.read_text(encoding="utf-8")) if end.exists() else {}
    except ValueError as error:
        raise DataError(f"summary.json: damaged ({error})") from error
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        wrong = [k for k in NUMBERS if not isinstance(row.get(k, 0), int | float | None)]
        if type(row.get("round")) is not int or wrong:
            raise DataError(f"metrics.jsonl: a row whose {wrong[0] if wrong else 'round'} is no number")
    done = summary.get("rounds") if summary.get("status") == "done" else None
    if isinstance(done, int) and (last := max((row["round"] for row in rows), default=0)) < done:
        raise DataError(
            f"metrics.jsonl: damaged: it ends with round {last}, but summary.json says {done} rounds are done"
        )
    method = str(summary.get("method") or plain.get("method") or _method(folder, plain))
    return Run(folder, method, plain["seed"], plain, rows, summary)


def _method(folder: Path, config: Mapping[str, Any]) -> str:
    """Of a run that names none: from ``<method>-s<seed>-<key>``, else the strategy's class."""
    if match := re.fullmatch(r"(.+)-s\d+-[0-9a-f]+", folder.name):
        return match[1]
    strategy = config.get("strategy")
    target = str(strategy.get("_target_", folder.name)) if isinstance(strategy, Mapping) else str(strategy)
    return target.rpartition(".")[2].lower()


def _run_folders(place: Path, problems: list[str]) -> Iterator[Path]:
    unread = lambda error: problems.append(f"{error.filename}: cannot be read ({error.strerror})")  # noqa: E731
    for folder, below, files in os.walk(place, onerror=unread):
        if "metrics.jsonl" in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _only_checkpoint(place: Path) -> str:
    there = (place / "checkpoint").is_dir()
    return "; it has a checkpoint, from which the run's own command goes on" if there else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("client.lr", 0.1)`` for every value of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _telling(heads: Sequence[tuple[str, Mapping[str, Any]]], followers: set[str]) -> list[str]:
    """Keys worth a column: they differ between groups; those that the method's name says, within one method."""

    def differs(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
        return len({as_key(config[key]) for config in configs if key in config}) > 1

    everyone = [config for _, config in heads]
    keys = sorted(set().union(*everyone) - followers, key=column_order)
    by_method = {method: [config for name, config in heads if name == method] for method, _ in heads}
    weightings = [key for key in keys if _WEIGHTING.match(key)]
    unlike = len({as_key(config[key]) for config in everyone for key in weightings if key in config}) > 1
    chosen = []
    for key in keys:
        if key in weightings and unlike:
            chosen.append(key)
            continue
        scopes = by_method.values() if _NAMED.match(key) else [everyone]
        if any(differs(key, scope) for scope in scopes):
            chosen.append(key)
    rows = {as_key([method, [config.get(k) for k in chosen]]) for method, config in heads}
    if len(rows) == len(heads):
        return chosen
    return [key for key in keys if len({as_key(config.get(key)) for config in everyone}) > 1]


def as_key(values: Any) -> str:
    """Settings as text that is the same for equal ones: 1 and 1.0 are, however they were typed."""
    return json.dumps(_whole(values), sort_keys=True, default=str)


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _once(runs: Sequence[Run]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.seed, -len(run.rows), str(run.dir))):
        if kept.setdefault(run.seed, run) is not run:
            log.warning("%s left out: %s is the same run (settings and seed)", run.dir, kept[run.seed].dir)
    return list(kept.values())


def column_order(key: str) -> tuple[bool, str]:
    """Sorts settings: the method's own first, then by name."""
    return not key.startswith("strategy."), key


def short_name(key: str) -> str:
    """``strategy.rho`` as ``rho``; ``model._target_`` as ``model``."""
    return key.removesuffix("._target_").rpartition(".")[2]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Short names of several settings; those that would share one (``partition.alpha``) keep more of their key."""
    keys = list(keys)
    alike = Counter(map(short_name, keys))
    return {key: short_name(key) if alike[short_name(key)] == 1 else key for key in keys}


def short_value(key: str, value: Any) -> str:
    """A setting's value as text; of a class or function its last part, of a long number the first four digits."""
    if isinstance(value, float) and len(repr(value)) > MAX_DIGITS:
        return f"{value:.4g}"
    return str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def _sortable(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if isinstance(value, (int, float)) else (True, 0.0, str(value))
