"""Which runs of those found are shown, how far, and under which names: ``--where``, ``--until`` and ``--rename``."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsim.errors import ConfigError, hint
from fedsim.report.runs import Run, flatten, short_name, short_value

log = logging.getLogger(__name__)

_CONDITION = re.compile(r"([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)")
_NUMERIC: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
METHOD = ("method", "strategy")  # both mean the method's name


def chosen(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that fit all conditions, such as ``strategy=fedavg,scaffold`` and ``partition.alpha<=0.3``.

    Commas are "or"; a key may be shortened to its last part if that is not ambiguous: of several, it is the one that
    all runs have, which is said.

    Raises:
        ConfigError: for a condition that is none, a key that no run has, or if no run is left.
    """
    left = list(runs)
    flats = {id(run): dict(flatten(run.config)) for run in runs} if conditions else {}
    keys = dict.fromkeys(key for flat in flats.values() for key in flat)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition.strip())
        if found is None or not found[3]:
            raise ConfigError(f"--where {condition}: type KEY=VALUE, or !=, <, <=, >, >= in place of =")
        key, sign, text = found.groups()
        name = key if key in METHOD else _full(key, keys, list(flats.values()))
        values = {id(run): run.method if name in METHOD else flats[id(run)].get(name) for run in left}
        before, left = left, [run for run in left if _fits(values[id(run)], name, sign, text.split(","))]
        if not left:
            there = dict.fromkeys(short_value(name, values[id(run)]) for run in before)
            near = hint(text, there) if sign == "=" else ""
            raise ConfigError(f"--where {condition}: no run is left of {len(runs)}{near}")
    return left


def renamed(runs: Sequence[Run], renames: Mapping[str, str]) -> list[Run]:
    """The runs with other names of methods.

    Raises:
        ConfigError: for a name that no run has, naming the nearest.
    """
    names = dict.fromkeys(run.method for run in runs)
    for old in renames:
        if old not in names:
            raise ConfigError(f"--rename {old}: no method of that name{hint(old, names)}")
    return [replace(run, method=renames.get(run.method, run.method)) for run in runs]


def first_rounds(runs: Sequence[Run], until: int | None) -> list[Run]:
    """The runs as if no more than ``until`` rounds had been asked for: later rows are gone, ``rounds`` is ``until``.

    A run that got that far is done, however it ended later; one of fewer rounds stays what it is.

    Raises:
        ConfigError: if that is no round.
    """
    if until is None:
        return list(runs)
    if until < 1:
        raise ConfigError(f"--until {until}: rounds are counted from 1")
    return [_cut(run, until) for run in runs]


def _cut(run: Run, until: int) -> Run:
    rows = [row for row in run.rows if int(row["round"]) <= until]
    asked, summary = run.config.get("rounds"), run.summary
    longer = isinstance(asked, int) and asked > until
    if rows and int(rows[-1]["round"]) == until:
        kept = {k: v for k, v in summary.items() if k not in ("error", "stopped")}
        summary = {**kept, "status": "done", "rounds": until}
    config = {**run.config, "rounds": until} if longer else run.config
    return replace(run, rows=rows, config=config, summary=summary, until=until)


def assignments(flag: str, words: Sequence[str], known: Iterable[str] = ()) -> dict[str, str]:
    """``OLD=NEW`` as a dictionary; ``a=A,b=B`` are two where b is one of the ``known`` names."""
    olds = "|".join(re.escape(name) for name in known)
    words = [
        part for word in words for part in (re.split(rf",(?=\s*(?:{olds})\s*=)", word) if olds else [word])
    ]
    for word in words:
        if not all(part.strip() for part in word.partition("=")):
            raise ConfigError(f"{flag} {word}: type OLD=NEW")
    return {old.strip(): new.strip() for old, _, new in (word.partition("=") for word in words)}


def _full(key: str, keys: Mapping[str, Any], flats: Sequence[Mapping[str, Any]]) -> str:
    if key in keys:
        return key
    fitting = [one for one in keys if short_name(one) == key]
    if len(fitting) == 1:
        return fitting[0]
    if f"{key}._target_" in keys:
        return f"{key}._target_"
    of_all = [one for one in fitting if all(one in flat for flat in flats)]
    if len(of_all) == 1:
        others = ", ".join(one for one in fitting if one != of_all[0])
        log.warning("--where %s: taken for %s, which all runs have; there is %s too", key, of_all[0], others)
        return of_all[0]
    listed = f"; there are {', '.join(fitting)}" if fitting else hint(key, [*METHOD, *keys])
    raise ConfigError(f"--where {key}: {'ambiguous' if fitting else 'no run has this setting'}{listed}")


def _fits(value: Any, key: str, sign: str, wanted: Sequence[str]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if sign in _NUMERIC:
        return number and any(_NUMERIC[sign](value, _float(text, key)) for text in wanted)
    texts = {"null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)}
    texts.add(short_value(key, value))
    equal = any(text in texts or (number and _is(value, text)) for text in wanted)
    return equal is (sign == "=")


def _is(value: float, text: str) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False


def _float(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--where {key}: {text!r} is no number to compare with") from None
