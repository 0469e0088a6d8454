"""Anything like an array as a tensor over its own memory, or as an array of text; what cannot be is refused by row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedsim.data.lazy import Mapped
from fedsim.errors import DataError

FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little with these
Array = Tensor | np.ndarray  # an array is one of text: numbers are tensors


def array(what: str, value: Any) -> Array:
    """``value`` as a tensor over its own memory where that is possible, or as an array of text (n, ...)."""
    if value is None:
        refuse(what, "is None", "hand over an array (n, ...), or leave it out")
    if isinstance(value, Tensor):
        if value.is_meta:
            refuse(what, "is on the meta device, which holds no values", "hand over a tensor with values")
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            refuse(
                what, "is a sparse, nested or quantised tensor", "hand over a plain one, e.g. x.to_dense()"
            )
        held = (value.detach() if value.requires_grad else value).cpu()
        found: Array = held.long() if held.dtype in FEW_OPERATIONS else held
    elif isinstance(value, Mapped):
        return value  # type: ignore[return-value]  # it stands for a tensor
    elif _in_file(value):
        return Mapped(value)  # type: ignore[return-value]
    elif hasattr(value, "toarray") and hasattr(value, "nnz"):
        refuse(what, "is a sparse matrix", "hand over x.toarray()")
    else:
        found = _from_numpy(what, _numpy(what, value))
    if found.ndim == 0:
        refuse(what, "is a single value", "hand over one entry per sample: (n, ...)")
    return found


def _in_file(value: Any) -> bool:
    """Whether ``value`` is an array of numbers in a file. A copy of one, a strided column, and what may differ from its
    file (mode ``c``) are read."""
    if type(value) is not np.memmap or value._mmap is None or value.mode == "c":  # type: ignore[attr-defined]
        return False
    column = value.size == len(value) and not value.flags.c_contiguous if value.ndim else True
    return not column and value.dtype.kind in "biuf" and value.dtype.isnative


def _numpy(what: str, value: Any) -> np.ndarray:
    """Lists, frames, series and array-likes as a NumPy array; ragged ones are refused by row."""
    kind = pandas_kind(value)
    if kind == "DataFrame":
        return _frame(what, value)
    if kind:
        return _objects(what, value.to_numpy())
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            row = int(np.argwhere(np.ma.getmaskarray(value))[0][0])
            refuse(f"{what}, row {row}", "has a masked entry", "fill or drop it")
        return np.asarray(value)
    if isinstance(value, list | tuple):
        return _stacked(what, value)
    try:
        out = np.asarray(value)
    except (ValueError, TypeError) as error:
        refuse(what, f"is {type(value).__name__} and no array ({error})", "hand over an array (n, ...)")
    if out.ndim == 0 and out.dtype.kind == "O":  # a set, a generator, an iterator
        refuse(what, f"is a {type(value).__name__}", "hand over an array (n, ...), or a list")
    return _objects(what, out)


def _stacked(what: str, rows: Sequence[Any]) -> np.ndarray:
    """A list of samples as one array; all must have one shape."""
    if any(hasattr(row, "getbands") for row in rows[:1]):
        refuse(what, "is a list of images", "turn them into arrays (channels, height, width) first")
    if any(isinstance(row, Mapping) for row in rows[:1]):
        refuse(what, "is a list of dicts", "hand over one dict with an array (n, ...) by each name")
    try:
        cells = [row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row) for row in rows]
    except (ValueError, TypeError) as error:
        refuse(what, f"is a list that is no array ({error})", "hand over an array (n, ...)")
    for i, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if cell.dtype.kind == "O" and cell.ndim == 0 and row is not None and not _gap(row):
            refuse(f"{what}, row {i}", f"is a {type(row).__name__}", "turn it into numbers (float(...))")
    texts = [cell.dtype.kind in "US" for cell in cells]
    if any(texts) and not all(texts) and all(cell.dtype.kind != "O" for cell in cells):
        at = texts.index(not texts[0])
        refuse(
            f"{what}, row {at}", "mixes text and numbers with the rows before", "make all of it one of them"
        )
    for i, cell in enumerate(cells):
        if cell.shape != cells[0].shape:
            refuse(
                f"{what}, row {i}",
                f"has shape {cell.shape}, row 0 has {cells[0].shape}",
                "pad or cut the rows to one shape, or hand over a torch Dataset in DataLoader(data, collate_fn=...)",
            )
    return _objects(what, np.stack(cells)) if cells else np.empty(0, dtype=np.float32)


def _frame(what: str, frame: Any) -> np.ndarray:
    """The columns of a pandas frame as numbers (n, columns)."""
    for name, column in frame.items():
        if column.dtype.kind not in "biuf":
            refuse(
                f"{what}, column {str(name)!r}",
                f"holds {column.dtype}",
                "turn it into numbers (pandas.get_dummies, .astype(float)) or leave it out",
            )
        if column.dtype.kind != "f" and column.isna().any():
            row = int(np.flatnonzero(column.isna().to_numpy())[0])
            refuse(f"{what}, column {str(name)!r}, row {row}", "is empty", "fill or drop it")
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
        if cell is None or _gap(cell):
            refuse(f"{what}, row {i * len(values) // max(len(flat), 1)}", "is empty", "fill or drop it")
    if all(isinstance(cell, str) for cell in flat):
        return values.astype(str)
    for i, cell in enumerate(flat):
        if isinstance(cell, str):
            refuse(what, f"mixes text ({cell!r}) and other things", "make all of it text, or all numbers")
        if isinstance(cell, float) and cell != cell and any(isinstance(c, str) for c in flat):
            refuse(f"{what}, row {i}", "is empty", "fill or drop it")
    for i, cell in enumerate(flat):
        if np.asarray(cell).dtype.kind == "O" and np.ndim(cell) == 0:  # a Decimal, a date
            row = i * len(values) // max(len(flat), 1)
            refuse(
                f"{what}, row {row}", f"holds a {type(cell).__name__}", "turn it into numbers (float(...))"
            )
    return _stacked(what, values.tolist()) if len(values) else np.empty(0, dtype=np.float32)


def _gap(cell: Any) -> bool:
    """Whether it is what pandas puts where there is no value."""
    return type(cell).__name__ in ("NAType", "NaTType")


def _from_numpy(what: str, values: np.ndarray) -> Array:
    """A tensor over the memory of ``values``, copied where torch cannot use that; text stays an array."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "U":
        return values
    if kind not in "biufc":
        refuse(what, f"holds {values.dtype}", "turn it into numbers")
    if kind == "u" and size > 1:
        if size == 8 and values.size and values.max() > np.iinfo(np.int64).max:
            refuse(what, "holds integers beyond 2**63", "scale them, or turn them into floats")
        values = values.astype(np.int32 if size == 2 else np.int64)
    elif kind == "f" and size > 8:
        values = values.astype(np.float64)
    elif not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    usable = values.flags.writeable and all(step >= 0 for step in values.strides)
    return torch.from_numpy(values if usable else values.copy())


def pandas_kind(value: Any) -> str:
    """``DataFrame``, ``Series`` or ``Index`` for what pandas made; empty for others. Does not import pandas."""
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return ""
    return next((k for k in ("DataFrame", "Series", "Index") if isinstance(value, getattr(pandas, k))), "")


def refuse(where: str, found: str, remedy: str) -> NoReturn:
    """Say whose samples cannot be read, why, and what to hand over.

    Raises:
        DataError: always.
    """
    raise DataError(f"{where} {found}; {remedy}")
