"""pandas frames as data sets: a row per sample, with columns for the target, whose it is, and its domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.data.containers import part
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.door import admit_parts
from fedsim.data.labels import TargetRules
from fedsim.errors import DataError, hint


def from_frame(
    frame: Any,
    *,
    y: str | Sequence[str],
    x: Sequence[str] | None = None,
    client: str | None = None,
    domain: str | None = None,
    test: str | None = None,
) -> Dataset:
    """A ``pandas.DataFrame`` as the ``data`` of ``fedsim.simulate``.

    Args:
        frame: a row per sample.
        y: the target's column: classes (numbers or text), or numbers to be predicted with a loss of their own; several
            columns are targets (N, K), for ``task=multilabel`` and ``task=regression``.
        x: input columns, all numbers; by default all others.
        client: whose a row is: each value is a client, in sorted order, unless another partition is asked for.
        domain: the domain of a row.
        test: a column of true and false, or of ``test`` and other words: rows of the common test set.

    Raises:
        DataError: naming the column that is missing or cannot be used.
    """
    names = list(map(str, frame.columns))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(
            f"from_frame: there are several columns '{twice}'; rename or drop one (frame.loc[:, ...])"
        )
    several = not isinstance(y, str)
    named = [c for c in (*(y if several else (y,)), client, domain, test, *(x or ())) if c is not None]
    for column in named:
        if column not in names:
            raise DataError(f"from_frame: there is no column '{column}'{hint(column, names)}")
    inputs = list(x) if x is not None else [c for c in frame.columns if str(c) not in named]
    for column in (c for c in (client, domain, test) if c is not None):
        if (gaps := np.flatnonzero(frame[column].isna().to_numpy())).size:
            raise DataError(f"from_frame: column '{column}', row {gaps[0]} is empty; fill or drop it")
    held = _flags(test, frame[test]) if test else np.zeros(len(frame), dtype=bool)
    kept = {"train": frame[~held], "test": frame[held]}
    parts = [
        part(name, (rows[inputs], rows[list(y) if several else y]))
        for name, rows in kept.items()
        if name == "train" or len(rows)
    ]
    numbers = several or (frame[y].dtype.kind == "f" and bool((frame[y].dropna() % 1 != 0).any()))
    pairs, classes = admit_parts(parts, TargetRules(own_loss=numbers))
    train, *rest = (Samples(*pair) for pair in pairs)
    domains = tuple(sorted(frame[domain].astype(str).unique())) if domain else ()
    return Dataset(
        train,
        rest[0] if rest else None,
        classes=classes,
        ids=_codes(kept["train"][client]) if client else None,
        groups={k: {"domain": _codes(v[domain], domains)} for k, v in kept.items()} if domain else {},
        group_names={"domain": domains} if domain else {},
    )


def _flags(name: str, column: Any) -> np.ndarray:
    words = column.astype(str).str.lower()
    found = set(words)
    for yes, no in (("true", "false"), ("1", "0"), ("1.0", "0.0")):
        if found <= {yes, no}:
            return np.asarray(words == yes)
    if "test" not in found:
        raise DataError(
            f"from_frame: column '{name}' holds {', '.join(sorted(found)[:3])}; expected true and false, or the word "
            "'test' for rows of the test set"
        )
    return np.asarray(words == "test")


def _codes(column: Any, names: Sequence[str] | None = None) -> np.ndarray:
    values = column.astype(str).to_numpy()
    known = np.array(sorted(set(values)) if names is None else names)
    return np.asarray(np.searchsorted(known, values), dtype=np.int64)
