"""What people hand over as a client's samples: each kind becomes one array of inputs and one of targets, or is refused.

Accepted are pairs ``(x, y)`` of tensors, NumPy arrays, nested lists, pandas frames and series, and map-style
``torch.utils.data`` data sets and loaders of such pairs. What has more than one reading is refused by client, with
what to hand over instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from fedsim.errors import DataError

FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little with these
Array = Tensor | np.ndarray  # an array is one of text: numbers are tensors


@dataclass(frozen=True)
class Part:
    """The samples of one participant: ``x`` and ``y`` (n, ...), and the names of the columns of ``x`` if it has any."""

    name: str  # for messages: "client 3", "the test set"
    x: Array
    y: Array
    columns: tuple[str, ...] = ()


def listed(clients: Any) -> list[Any]:
    """The clients one by one: the values of a mapping in its order, or the entries of a list."""
    if isinstance(clients, Mapping):
        return list(clients.values())
    if isinstance(clients, Tensor | np.ndarray | DataLoader | str | bytes) or _pandas(clients):
        raise DataError(
            f"clients: got a {type(clients).__name__}; expected a list with one (x, y) pair per client"
        )
    if not isinstance(clients, Iterable):
        raise DataError(
            f"clients: got {type(clients).__name__}; expected a list with one (x, y) pair per client"
        )
    return list(clients)


def part(name: str, given: Any) -> Part:
    """The samples that ``given`` holds; ``name`` says whose they are.

    Raises:
        DataError: for a kind that has no single reading; says whose it is and what to hand over.
    """
    x, y = _pair(name, given)
    columns = tuple(map(str, x.columns)) if _pandas(x) == "DataFrame" else ()
    return Part(name, array(f"{name}, x", x), array(f"{name}, y", y), columns)


def array(what: str, value: Any) -> Array:
    """``value`` as a tensor over its own memory where that is possible, or as an array of text (n, ...)."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            _refuse(
                what, "is a sparse, nested or quantised tensor", "hand over a plain one, e.g. x.to_dense()"
            )
        held = (value.detach() if value.requires_grad else value).cpu()
        found: Array = held.long() if held.dtype in FEW_OPERATIONS else held
    elif isinstance(value, Mapping):
        _refuse(
            what, "is a dict", "hand over one array (n, ...); several inputs per sample are not supported yet"
        )
    elif hasattr(value, "toarray") and hasattr(value, "nnz"):
        _refuse(what, "is a sparse matrix", "hand over x.toarray()")
    else:
        found = _from_numpy(what, _numpy(what, value))
    if found.ndim == 0:
        _refuse(what, "is a single value", "hand over one entry per sample: (n, ...)")
    return found


def _pair(name: str, given: Any) -> tuple[Any, Any]:
    """The two halves of what a client hands over."""
    if isinstance(given, DataLoader):
        if given.collate_fn is not default_collate:
            _refuse(name, "is a DataLoader with a collate_fn of its own", "hand over (x, y) as arrays")
        given = given.dataset  # client.batch_size says how large batches are
    kind = type(given).__name__
    if isinstance(given, IterableDataset):
        _refuse(name, f"is a {kind}, which has no length", "read it once and hand over (x, y)")
    if isinstance(given, TensorDataset):
        given = given.tensors
    if isinstance(given, tuple | list):
        if len(given) != 2:
            _refuse(name, f"is a {kind} of {len(given)}", "hand over (x, y)")
        return given[0], given[1]
    if isinstance(given, Mapping):
        _refuse(name, f"is a dict with {', '.join(map(str, list(given)[:5]))}", "hand over (x, y)")
    if _pandas(given):
        _refuse(name, f"is a {kind}", "hand over (frame[features], frame[label])")
    if isinstance(given, Tensor | np.ndarray | str | bytes) or not hasattr(given, "__getitem__"):
        _refuse(name, f"is {kind}", "hand over (x, y): inputs and targets")
    return _rows_of(name, given)


def _rows_of(name: str, data: Any) -> tuple[Any, Any]:
    """All samples of a map-style data set, read once."""
    kind = type(data).__name__
    rows = [data[i] for i in range(len(data))]
    for i, row in enumerate(rows):
        if not isinstance(row, tuple | list) or len(row) != 2:
            _refuse(
                f"{name}, row {i}", f"of its {kind} is a {type(row).__name__}", "hand over (x, y) as arrays"
            )
    if not rows:
        return [], []
    if not np.array_equal(np.asarray(rows[0][0]), np.asarray(data[0][0])):
        _refuse(
            name,
            f"is a {kind} that gives another first sample each time",
            "leave random transforms out of it: data are read once, data.augment draws anew for every batch",
        )
    xs, ys = zip(*rows, strict=True)
    return list(xs), list(ys)


def _numpy(what: str, value: Any) -> np.ndarray:
    """Lists, frames, series and array-likes as a NumPy array; ragged ones are refused by row."""
    kind = _pandas(value)
    if kind == "DataFrame":
        return _frame(what, value)
    if kind:
        return _objects(what, value.to_numpy())
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            row = int(np.argwhere(np.ma.getmaskarray(value))[0][0])
            _refuse(f"{what}, row {row}", "has a masked entry", "fill or drop it")
        return np.asarray(value)
    if isinstance(value, list | tuple):
        return _stacked(what, value)
    try:
        out = np.asarray(value)
    except (ValueError, TypeError) as error:
        _refuse(what, f"is {type(value).__name__} and no array ({error})", "hand over an array (n, ...)")
    return _objects(what, out)


def _stacked(what: str, rows: Sequence[Any]) -> np.ndarray:
    """A list of samples as one array; all must have one shape."""
    if any(hasattr(row, "getbands") for row in rows[:1]):
        _refuse(what, "is a list of images", "turn them into arrays (channels, height, width) first")
    if any(isinstance(row, Mapping) for row in rows[:1]):
        _refuse(
            what, "is a list of dicts", "hand over one array (n, ...); trees of inputs are not supported yet"
        )
    try:
        cells = [row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row) for row in rows]
    except (ValueError, TypeError) as error:
        _refuse(what, f"is a list that is no array ({error})", "hand over an array (n, ...)")
    for i, cell in enumerate(cells):
        if cell.shape != cells[0].shape:
            _refuse(
                f"{what}, row {i}",
                f"has shape {cell.shape}, row 0 has {cells[0].shape}",
                "pad or cut the rows to one shape",
            )
    return _objects(what, np.stack(cells)) if cells else np.empty(0, dtype=np.float32)


def _frame(what: str, frame: Any) -> np.ndarray:
    """The columns of a pandas frame as numbers (n, columns)."""
    for name, column in frame.items():
        if column.dtype.kind not in "biuf":
            _refuse(
                f"{what}, column {str(name)!r}",
                f"holds {column.dtype}",
                "turn it into numbers (pandas.get_dummies, .astype(float)) or leave it out",
            )
        if column.dtype.kind != "f" and column.isna().any():
            row = int(np.flatnonzero(column.isna().to_numpy())[0])
            _refuse(f"{what}, column {str(name)!r}, row {row}", "is empty", "fill or drop it")
    types = {column.dtype for _, column in frame.items()}
    if len(types) == 1 and isinstance(next(iter(types)), np.dtype):
        return np.asarray(frame.to_numpy())
    kinds = {dtype.kind for dtype in types}
    common = np.bool_ if kinds == {"b"} else np.int64 if kinds <= {"i", "u"} else np.float64
    return np.asarray(frame.to_numpy(dtype=common, na_value=np.nan if common is np.float64 else None))


def _objects(what: str, values: np.ndarray) -> np.ndarray:
    """Arrays of Python objects as numbers or as text; a gap is refused by row."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    if values.dtype.kind != "O":
        return values
    flat = values.reshape(-1)
    for i, cell in enumerate(flat):
        if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
            _refuse(f"{what}, row {i * len(values) // max(len(flat), 1)}", "is empty", "fill or drop it")
    if all(isinstance(cell, str) for cell in flat):
        return values.astype(str)
    for i, cell in enumerate(flat):
        if isinstance(cell, str):
            _refuse(what, f"mixes text ({cell!r}) and other things", "make all of it text, or all numbers")
        if isinstance(cell, float) and cell != cell and any(isinstance(c, str) for c in flat):
            _refuse(f"{what}, row {i}", "is empty", "fill or drop it")
    return _stacked(what, values.tolist()) if len(values) else np.empty(0, dtype=np.float32)


def _from_numpy(what: str, values: np.ndarray) -> Array:
    """A tensor over the memory of ``values``, copied where torch cannot use that; text stays an array."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "U":
        return values
    if kind not in "biufc":
        _refuse(what, f"holds {values.dtype}", "turn it into numbers")
    if kind == "u" and size > 1:
        if size == 8 and values.size and values.max() > np.iinfo(np.int64).max:
            _refuse(what, "holds integers beyond 2**63", "scale them, or turn them into floats")
        values = values.astype(np.int32 if size == 2 else np.int64)
    elif kind == "f" and size > 8:
        values = values.astype(np.float64)
    elif not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    usable = values.flags.writeable and all(step >= 0 for step in values.strides)
    return torch.from_numpy(values if usable else values.copy())


def _pandas(value: Any) -> str:
    """``DataFrame``, ``Series`` or ``Index`` for what pandas made; empty for others. Does not import pandas."""
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return ""
    return next((k for k in ("DataFrame", "Series", "Index") if isinstance(value, getattr(pandas, k))), "")


def _refuse(where: str, found: str, remedy: str) -> NoReturn:
    raise DataError(f"{where} {found}; {remedy}")
