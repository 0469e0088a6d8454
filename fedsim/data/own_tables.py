"""Tables of one's own, CSV or Parquet, read by the columns that ``data.contract`` names and checked value by value."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.config.textfile import read_text
from fedsim.data.agreed import Contract, missing_and_extra
from fedsim.data.columns import ContractError, gaps_of, numbers, texts
from fedsim.data.common import encode
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.files import PathLike, columns_of, existing, read_table
from fedsim.errors import ConfigError, DataError, NoSamplesError

SUFFIXES = (".csv", ".parquet")
LAYOUT = (
    "a .csv or .parquet file of training samples, or a folder with train.csv (.parquet), test.csv or both"
)


def table(
    path: PathLike | None,
    *,
    target: str,
    ids: str | None = None,
    ignore: Sequence[str] = (),
    contract: Mapping[str, Any] | None = None,
) -> Dataset:
    """A table of one's own: x ``(N, d)`` float64, a row per sample.

    Args:
        path: a file, all of it training samples, or a folder with ``train.csv`` or ``train.parquet``, ``test.*``
            likewise, or both.
        target: column of the class, by the names of ``contract``'s classes; without classes, numbers to be predicted.
        ids: column of natural client ids, where it is there.
        ignore: columns that may be there and are not read.
        contract: what ``data.contract`` says; its columns are the inputs, in that order.

    Raises:
        ContractError: with a line for each column or class that is not as agreed: what, how many, which row.
    """
    agreed = Contract.of(contract)
    if agreed is None or not agreed.columns:
        raise ConfigError(
            "data=table: say what it holds: data.contract={classes: [healthy, ill], columns: {age: {unit: years, "
            "range: [0, 120]}, sex: {categories: [f, m]}}}"
        )
    if path is None:
        raise DataError(f"data.path=null: data=table is read from files only: {LAYOUT}")
    found = {
        split: _read(_cells(file), file, agreed, target, ids, ignore) for split, file in _files(path).items()
    }
    if faults := [fault for part in found.values() for fault in part.faults]:
        raise ContractError("\n".join(faults))
    empty = _Read(torch.zeros(0, len(agreed.features), dtype=torch.float64), _no_targets(agreed))
    if not any(len(part.y) for part in found.values()):
        raise NoSamplesError(f"{path}: no rows below the header")
    train = found.get("train", empty)
    return Dataset(
        train=Samples(train.x, train.y),
        test=Samples(found["test"].x, found["test"].y) if "test" in found else None,
        classes=agreed.classes,
        ids=train.ids,
        columns=agreed.features,
    )


@dataclass(frozen=True)
class _Read:
    """One file: inputs (n, d), targets (n,), ids (n,), and what is wrong with it."""

    x: Tensor
    y: Tensor
    ids: np.ndarray | None = None
    faults: Sequence[str] = ()


def _files(path: PathLike) -> dict[str, Path]:
    root = existing(path, LAYOUT)
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise DataError(f"{root}: expected {LAYOUT}")
        return {"train": root}
    files: dict[str, Path] = {}
    for split in ("train", "test"):
        there = [root / f"{split}{suffix}" for suffix in SUFFIXES if (root / f"{split}{suffix}").exists()]
        if len(there) > 1:
            raise DataError(f"{root}: holds both {there[0].name} and {there[1].name}; leave one of them")
        if there:
            files[split] = there[0]
    if not files:
        raise DataError(f"{root}: expected {LAYOUT}")
    return files


def _cells(file: Path) -> dict[str, np.ndarray]:
    """Columns of a file as they are written: text, or numbers with NaN for gaps."""
    if file.suffix.lower() == ".csv":
        return _csv(file)
    names = columns_of(file)
    columns, held = read_table(file, names), {}
    for name in names:
        column = columns[name]
        numeric = str(column.type).startswith(("int", "uint", "float", "double", "halffloat"))
        frame = column.to_pandas() if numeric else None
        held[name] = (
            np.array(column.to_pylist(), dtype=object)
            if frame is None
            else np.asarray(frame, dtype=frame.dtype if frame.dtype.kind in "iuf" else np.float64)
        )
    return held


def _csv(file: Path) -> dict[str, np.ndarray]:
    try:
        lines = io.StringIO(read_text(file), newline="")
        head, *rows = [row for row in csv.reader(lines) if row] or [[]]
    except (OSError, csv.Error, ValueError) as error:
        raise DataError(f"{file} is not a readable CSV file with a header, in UTF-8 ({error})") from error
    if not head:
        raise NoSamplesError(f"{file}: the file is empty; expected a header and a row per sample")
    head = [name.strip() for name in head]
    if len(head) == 1 and (marks := [mark for mark in (";", "\t", "|") if mark in head[0]]):
        raise DataError(f"{file}: cells are separated by {marks[0]!r} in its header; write commas")
    if len(set(head)) < len(head):
        raise DataError(f"{file}: two columns have the same name; the header is {', '.join(head)}")
    if odd := [i for i, row in enumerate(rows) if len(row) != len(head)]:
        raise ContractError(
            f"rows: {len(odd)} of {len(rows)} have other than {len(head)} cells, e.g. row {odd[0] + 1}; put cells with "
            "commas in quotes"
        )
    cells = np.array(rows, dtype=object).reshape(len(rows), len(head))
    return {name: cells[:, k] for k, name in enumerate(head)}


def _read(
    cells: Mapping[str, np.ndarray],
    file: Path,
    agreed: Contract,
    target: str,
    ids: str | None,
    ignore: Sequence[str],
) -> _Read:
    inputs = [column for column in agreed.columns if column.name != target]
    if len(inputs) < len(agreed.columns):
        raise ConfigError(f"data.contract.columns.{target}: is data.target; leave it out of the inputs")
    names = [name for name in cells if name not in (*ignore, ids)]
    faults = missing_and_extra(names, [*(column.name for column in inputs), target])
    features = []
    for column in inputs:
        if column.name in cells:
            values, wrong = column.read(_typed(cells[column.name], column.kind, file))
            features.append(values)
            faults += wrong
    y = _no_targets(agreed)
    if target in cells:
        y, wrong = _targets(cells[target], target, agreed.classes)
        faults += wrong
    x = torch.from_numpy(np.concatenate(features, axis=1)) if features else torch.zeros(0, 0)
    whose = encode(texts(cells[ids]).astype(str))[0] if ids is not None and ids in cells else None
    return _Read(x, y, whose, faults)


def _typed(cells: np.ndarray, kind: str, file: Path) -> np.ndarray:
    """``cells``, in which numbers that a Parquet file holds as text are no numbers."""
    if file.suffix.lower() == ".csv" or kind == "category" or cells.dtype.kind != "O":
        return cells
    gaps = gaps_of(cells)
    return np.array([c if gap else "text" for c, gap in zip(cells, gaps, strict=True)], dtype=object)


def _targets(cells: np.ndarray, name: str, classes: Sequence[str]) -> tuple[Tensor, list[str]]:
    gaps = gaps_of(cells)
    if not classes:
        values, bad = numbers(cells, gaps)
        odd = gaps | bad | ~np.isfinite(values)
        return torch.from_numpy(values), _odd(name, odd, "are no numbers; fill or drop those rows")
    found = texts(cells)[:, None] == np.array(classes, dtype=object)[None, :]
    odd, agreed = gaps | ~found.any(axis=1), ", ".join(classes[:5])
    said = f"name none of the classes agreed ({agreed}{', ...' if len(classes) > 5 else ''}); rename or drop those rows"
    return torch.from_numpy(found.argmax(axis=1).astype(np.int64)), _odd(name, odd, said)


def _odd(name: str, odd: np.ndarray, said: str) -> list[str]:
    if not odd.any():
        return []
    return [f"target '{name}': {int(odd.sum())} of {len(odd)}, e.g. in row {int(odd.argmax()) + 1}, {said}"]


def _no_targets(agreed: Contract) -> Tensor:
    return torch.zeros(0, dtype=torch.int64 if agreed.classes else torch.float64)
