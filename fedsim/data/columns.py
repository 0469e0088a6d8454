"""Columns of a table as they were agreed (type, unit, range, categories, what fills gaps), and values that differ.

What is said of values that do not names column, count and an example row, never a value: it may leave a hospital.
Rows count from 1, without the header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.errors import ConfigError, DataError, check_choice, hint

GAPS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")  # cells that hold nothing
UNIT = 0.2  # share of values beyond the range from which on another unit is the likelier cause
NAMES = ("type", "unit", "range", "categories", "missing")
KINDS = ("number", "integer", "category")


class ContractError(DataError):
    """Data are not as agreed. Its text has counts, names and row numbers, and no values: it may be sent on."""


@dataclass(frozen=True)
class Column:
    """One column. A ``category`` becomes one feature per category, in their order, of 0 and 1."""

    name: str
    kind: str = "number"  # number | integer | category
    unit: str = ""  # for people, and in messages
    low: float | None = None  # values below are refused
    high: float | None = None  # values above are refused
    categories: tuple[str, ...] = ()
    missing: float | str | None = None  # fills gaps; None: gaps are refused

    @staticmethod
    def of(name: str, node: Any, key: str) -> Column:
        """What the configuration says of column ``name`` at ``key``.

        Raises:
            ConfigError: naming the key, and what to type.
        """
        key = f"{key}.{name}"
        if name.startswith("_") or (node is not None and not isinstance(node, Mapping)):
            raise ConfigError(
                f"{key}={node}: expected {{unit: years, range: [0, 120]}} or {{categories: [f, m]}}, and a name that "
                "does not begin with '_'"
            )
        values = {str(k): v for k, v in (node or {}).items()}
        for word in values:
            if word not in NAMES:
                raise ConfigError(f"unknown key '{key}.{word}'{hint(word, NAMES, f'{key}.')}")
        known = tuple(str(c) for c in values.get("categories") or ())
        kind = str(values.get("type") or ("category" if known else "number"))
        check_choice(f"{key}.type", kind, KINDS)
        if (kind == "category") != bool(known) or len(set(known)) < len(known):
            raise ConfigError(f"{key}.categories={list(known)}: a category has them, each once, others none")
        low, high = _bounds(values.get("range"), f"{key}.range")
        column = Column(
            name, kind, str(values.get("unit") or ""), low, high, known, _fill(values.get("missing"))
        )
        if column.missing is not None and not column._may_be(column.missing):
            raise ConfigError(
                f"{key}.missing={column.missing}: must be a value that the column itself may have"
            )
        return column

    @property
    def features(self) -> tuple[str, ...]:
        """Names of what it becomes in the inputs."""
        return tuple(f"{self.name}={c}" for c in self.categories) or (self.name,)

    def read(self, cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Features (n, k) float64 of ``cells`` (n,), text or numbers with NaN for gaps; and what is wrong with them."""
        if self.kind == "category":
            return self._read_categories(cells)
        gaps, faults = gaps_of(cells), []
        values, bad = numbers(cells, gaps)
        if fault := self.fault(bad, "no numbers", f"write them as {self._wanted()}"):
            faults.append(fault)
        if gaps.any() and self.missing is not None:
            values[gaps] = float(self.missing)
        elif fault := self.fault(gaps, "empty", f"fill them, or agree on {self.name}.missing"):
            faults.append(fault)
        return values[:, None], faults + self.beyond(values, ~(gaps | bad))

    def beyond(self, values: np.ndarray, there: np.ndarray) -> list[str]:
        """What is wrong with numbers (n,) of which only those ``there`` (n,) count."""
        faults = [self.fault(there & ~np.isfinite(values), "not finite", "fill or drop those rows")]
        there = there & np.isfinite(values)
        if self.kind == "integer":
            faults.append(
                self.fault(
                    there & (values != np.round(values)), "no whole numbers", "round, or agree on number"
                )
            )
        low, high = (-np.inf if self.low is None else self.low, np.inf if self.high is None else self.high)
        out = there & ((values < low) | (values > high))
        many = out.sum() > UNIT * max(int(there.sum()), 1)
        remedy = (
            f"so many: is the unit another than {self.unit or 'the agreed one'}? Convert them"
            if many
            else "correct or drop those rows"
        )
        faults.append(self.fault(out, f"outside {_bound(self.low)} to {_bound(self.high)}", remedy))
        return [fault for fault in faults if fault]

    def fault(self, bad: np.ndarray, what: str, remedy: str) -> str:
        """One line on the rows that are ``bad`` (n,); nothing if none is."""
        count = int(bad.sum())
        if not count:
            return ""
        unit = f" in {self.unit}" if self.unit else ""
        first = int(np.flatnonzero(bad)[0]) + 1
        return f"column '{self.name}'{unit}: {count} of {len(bad)} values are {what}, e.g. in row {first}; {remedy}"

    def _read_categories(self, cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
        words, gaps, faults = texts(cells), gaps_of(cells), []
        if gaps.any() and self.missing is not None:
            words[gaps] = str(self.missing)
        elif fault := self.fault(gaps, "empty", f"fill them, or agree on {self.name}.missing"):
            faults.append(fault)
        found = words[:, None] == np.array(self.categories, dtype=object)[None, :]
        odd = ~found.any(axis=1) & ~(gaps if self.missing is None else np.zeros_like(gaps))
        if fault := self.fault(odd, f"none of {', '.join(self.categories)}", "rename or drop them"):
            faults.append(fault)
        return found.astype(np.float64), faults

    def _may_be(self, value: float | str) -> bool:
        if self.kind == "category":
            return str(value) in self.categories
        return isinstance(value, float) and not self.beyond(np.array([value]), np.array([True]))

    def _wanted(self) -> str:
        return "whole numbers" if self.kind == "integer" else "numbers with a decimal point"


def gaps_of(cells: np.ndarray) -> np.ndarray:
    """Which ``cells`` (n,) hold nothing."""
    if cells.dtype.kind == "f":
        return np.asarray(np.isnan(cells))
    if cells.dtype.kind != "O":
        return np.zeros(len(cells), dtype=bool)
    return np.array([c is None or (isinstance(c, str) and c.strip() in GAPS) for c in cells], dtype=bool)


def numbers(cells: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``cells`` (n,) as float64, NaN where they are gaps or no numbers, and which are no numbers."""
    out, bad = np.full(len(cells), np.nan), np.zeros(len(cells), dtype=bool)
    if cells.dtype.kind in "iuf":
        return cells.astype(np.float64), bad
    bad = np.array([isinstance(c, str) and "_" in c for c in cells], dtype=bool)  # 1_000 is Python's alone
    there = ~(gaps | bad)
    try:
        out[there] = cells[there].astype(np.float64)
    except (TypeError, ValueError):
        for i in np.flatnonzero(there):
            try:
                out[i] = float(cells[i])
            except (TypeError, ValueError):
                bad[i] = True
    return out, bad


def texts(cells: np.ndarray) -> np.ndarray:
    """``cells`` (n,) as words, as they are written in a file: whole numbers without a point."""

    def word(cell: Any) -> str:
        whole = isinstance(cell, float | np.floating) and np.isfinite(cell) and cell == int(cell)
        return str(int(cell)) if whole else str(cell).strip()

    return np.array([word(c) for c in cells], dtype=object)


def _bounds(node: Any, key: str) -> tuple[float | None, float | None]:
    if node is None:
        return None, None
    ends = list(node) if isinstance(node, Sequence) and not isinstance(node, str) else []
    fine = all(e is None or (isinstance(e, int | float) and not isinstance(e, bool) and e == e) for e in ends)
    if len(ends) != 2 or not fine or (None not in ends and ends[0] > ends[1]):
        raise ConfigError(f"{key}={node}: expected [lowest, highest], null where there is no bound")
    low, high = (None if e is None else float(e) for e in ends)
    return low, high


def _fill(value: Any) -> float | str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else None if value is None else str(value)


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"
