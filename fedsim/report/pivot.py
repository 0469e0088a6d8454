"""Tables with one setting down and another across: ``--pivot method partition.alpha``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from fedsim.errors import ConfigError, hint
from fedsim.report.arms import Arm
from fedsim.report.blocks import ComparisonPlan, ProblemBlock, leaders
from fedsim.report.runs import short_name, short_names, short_value
from fedsim.report.tables import Cell, TextTable, value_text

METHOD = "method"
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
Place = tuple[ProblemBlock, Arm]


def pivot(
    blocks: Sequence[ProblemBlock], plan: ComparisonPlan, row: str, column: str, order: Sequence[str] = ()
) -> list[tuple[str, TextTable]]:
    """A table per combination of the settings that are neither down nor across, each with a title.

    Settings of methods that every cell has one value of make no tables of their own; a line names them. The best of a
    column is marked where all of the column is one problem. A cell with fewer seeds than others of its table has their
    number as an exponent.

    Raises:
        ConfigError: for a key in which no runs differ.
    """
    places = [(block, arm) for block in blocks for arm in block.ranked]
    keys = dict.fromkeys(key for place in places for key in _settings(*place))
    row, column = (_key(name, keys, places) for name in (row, column))
    said = [key for key in keys if key not in (row, column) and _said_once(key, row, column, places)]
    if row == column:
        raise ConfigError(f"--pivot {row} {column}: type two settings, one down and one across")
    rest = [key for key in keys if key not in (row, column, *said)]
    tables: dict[str, list[Place]] = {}
    names = short_names(rest)
    for place in places:
        settings = [f"{names[k]}={short_value(k, v)}" for k in rest if (v := _value(place, k)) is not None]
        tables.setdefault(", ".join(settings), []).append(place)
    return [(title, _table(found, plan, row, column, order, said)) for title, found in tables.items()]


def _said_once(key: str, row: str, column: str, places: Sequence[Place]) -> bool:
    """Whether it is a setting of methods, and each cell has one value of it."""
    found: dict[tuple[str, str], set[str]] = {}
    for place in places:
        cell = str(_value(place, row)), str(_value(place, column))
        found.setdefault(cell, set()).add(str(_value(place, key)))
    problem = any(key in block.setting.differing for block, _ in places)
    return key != METHOD and not problem and all(len(values) == 1 for values in found.values())


def _own(places: Sequence[Place], said: Sequence[str]) -> list[str]:
    """``fedavg: weighting=samples; fedprox, scaffold: weighting=uniform``, of each key in which arms differ."""
    out, names = [], short_names(said)
    for key in said:
        users: dict[str, list[str]] = {}
        for place in places:
            if (value := _value(place, key)) is not None:
                users.setdefault(f"{names[key]}={short_value(key, value)}", []).append(place[1].group.method)
        known = [f"{', '.join(dict.fromkeys(methods))}: {text}" for text, methods in users.items()]
        out += ["; ".join(known)] if known else []
    return out


def _table(
    places: Sequence[Place],
    plan: ComparisonPlan,
    row: str,
    column: str,
    order: Sequence[str],
    said: Sequence[str],
) -> TextTable:
    downs, acrosses = (_sorted((_value(place, key) for place in places), order) for key in (row, column))
    cells: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        cells.setdefault((str(_value(place, row)), str(_value(place, column))), []).append(place)
    most = max((len(arm.values) for _, arm in places), default=0)
    marks: dict[int, str] = {}
    below = []
    for across in acrosses:
        inside = [place for key, found in cells.items() if key[1] == str(across) for place in found]
        if len({block.setting.hash for block, _ in inside}) == 1:
            stars, undecided = leaders([arm for _, arm in inside], plan)
            marks |= {id(arm): "tie" if len(stars) > 1 else "best" for _, arm in inside if arm.name in stars}
            below += [f"{short_name(column)}={short_value(column, across)}: {undecided}"] if undecided else []
    rows = []
    for down in downs:
        line = [Cell(short_value(row, down))]
        for across in acrosses:
            found = cells.get((str(down), str(across)), [])
            line.append(_cell([arm for _, arm in found], plan, most, marks))
        rows.append(line)
    header = [
        short_name(row),
        *(f"{short_name(column)}={short_value(column, across)}" for across in acrosses),
    ]
    words = plan.objective.said(len(n.rounds) for _, arm in places for n in arm.numbers.values() if n.rounds)
    unit = f"{words}{', %' if plan.objective.share else ''}: mean ± sample standard deviation, n = {most}"
    lines = [unit, *_own(places, said), *below]
    return TextTable(header, [False, *[True] * len(acrosses)], rows, [""] * len(rows), [0] * len(rows), lines)


def _cell(arms: Sequence[Arm], plan: ComparisonPlan, most: int, marks: dict[int, str]) -> Cell:
    if len(arms) != 1:
        return Cell("-" if not arms else f"({len(arms)} settings)")
    values = [value for value in arms[0].values.values() if math.isfinite(value)]
    mean, std = (fmean(values) if values else math.nan), (stdev(values) if len(values) > 1 else math.nan)
    text = value_text(mean, std, plan.objective.share, 4)
    fewer = str(len(values)).translate(_SUPERSCRIPT) if len(values) < most else ""
    return Cell(text + fewer, marks.get(id(arms[0]), ""))


def _settings(block: ProblemBlock, arm: Arm) -> list[str]:
    return [METHOD, *block.setting.differing, *arm.group.settings]


def _value(place: Place, key: str) -> Any:
    block, arm = place
    if key == METHOD:
        return arm.group.method
    return arm.group.settings.get(key, block.setting.differing.get(key))


def _key(name: str, keys: Iterable[str], places: Sequence[Place]) -> str:
    keys = list(keys)
    if name in ("strategy", *keys):
        return METHOD if name == "strategy" else name
    fitting = [key for key in keys if short_name(key) == name]
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(
        f"--pivot {name}: the runs do not differ in it{hint(name, keys)}; they do in {', '.join(keys)}"
    )


def _sorted(values: Iterable[Any], order: Sequence[str]) -> list[Any]:
    """Distinct values: as in ``order``, else numbers by size and others as they come."""
    places = {text: at for at, text in enumerate(order)}
    distinct = list({str(value): value for value in values}.values())

    def rank(value: Any) -> tuple[int, float]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return places.get(str(value), len(places)), float(value) if number else 0.0

    return sorted(distinct, key=rank)
