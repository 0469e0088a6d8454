"""What people hand over as a client's samples: each kind becomes one array of inputs and one of targets, or is refused.

Accepted are pairs ``(x, y)`` of tensors, NumPy arrays, nested lists, pandas frames and series, or of trees of such: a
dict, or a tuple of several inputs. ``y`` may be ``None``. A dict of arrays alone is inputs without targets, unless its
keys are ``x`` and ``y``. Map-style ``torch.utils.data`` data sets, and loaders of such with their ``collate_fn``, are
read when their samples are needed, and so are memory-mapped arrays. What has more than one reading is refused by
client, with what to hand over instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from fedsim.data.dataset import Samples
from fedsim.data.hf import Columns, columns, is_hf
from fedsim.data.lazy import Mapped, Read
from fedsim.errors import DataError

FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little with these
Array = Tensor | np.ndarray  # an array is one of text: numbers are tensors


@dataclass(frozen=True)
class Part:
    """The samples of one participant: ``x`` and ``y`` (n, ...), and the names of the columns of ``x`` if it has any."""

    name: str  # for messages: "client 3", "the test set"
    x: Any  # an array, a tree of arrays
    y: Any
    columns: tuple[str, ...] = ()
    read: Read | Columns | None = None  # instead of both, samples that are read when they are needed

    @property
    def plain(self) -> bool:
        """Whether inputs are one array and targets another."""
        return isinstance(self.x, Array) and isinstance(self.y, Array)

    def __len__(self) -> int:
        return len(self.read) if self.read is not None else first_size(self.x)


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
    found = _pair(name, given)
    if isinstance(found, Read | Columns):
        return Part(name, None, None, read=found)
    x, y = found
    columns = tuple(map(str, x.columns)) if _pandas(x) == "DataFrame" else ()
    targets = None if y is None else _tree(f"{name}, y", y)
    inputs = _tree(f"{name}, x", x, len(targets) if isinstance(targets, Array) else None)
    return Part(name, inputs, targets, columns)


def first_size(tree: Any) -> int:
    """Entries of the first array of a tree."""
    while isinstance(tree, Mapping | tuple):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree), ())
    return len(tree) if tree is not None else 0


def _tree(what: str, value: Any, n: int | None = None) -> Any:
    """``value`` as an array, or a tree of arrays: a dict, or a tuple of several arrays of ``n`` entries each."""
    if isinstance(value, Mapping):
        if not value:
            _refuse(what, "is an empty dict", "hand over its arrays by name")
        return {str(k): _tree(f"{what}[{k!r}]", v, n) for k, v in value.items()}
    if isinstance(value, tuple) and _several(value, n):
        return tuple(_tree(f"{what}[{i}]", v, n) for i, v in enumerate(value))
    return array(what, value)


def _several(value: tuple[Any, ...], n: int | None) -> bool:
    """Whether a tuple holds arrays of all samples, and not one array for each sample."""
    if not value or not all(isinstance(v, Tensor | np.ndarray | Mapping) for v in value):
        return False
    sizes = {first_size(v) for v in value if isinstance(v, Mapping) or v.ndim}
    return len(sizes) == 1 and len(value) != next(iter(sizes)) and n in (None, *sizes)


def array(what: str, value: Any) -> Array:
    """``value`` as a tensor over its own memory where that is possible, or as an array of text (n, ...)."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            _refuse(
                what, "is a sparse, nested or quantised tensor", "hand over a plain one, e.g. x.to_dense()"
            )
        held = (value.detach() if value.requires_grad else value).cpu()
        found: Array = held.long() if held.dtype in FEW_OPERATIONS else held
    elif isinstance(value, Mapped):
        return value  # type: ignore[return-value]  # it stands for a tensor
    elif type(value) is np.memmap and value.ndim and value.dtype.kind in "biuf" and value.dtype.isnative:
        return Mapped(value)  # type: ignore[return-value]
    elif hasattr(value, "toarray") and hasattr(value, "nnz"):
        _refuse(what, "is a sparse matrix", "hand over x.toarray()")
    else:
        found = _from_numpy(what, _numpy(what, value))
    if found.ndim == 0:
        _refuse(what, "is a single value", "hand over one entry per sample: (n, ...)")
    return found


def _pair(name: str, given: Any) -> tuple[Any, Any] | Read | Columns:
    """The two halves of what a client hands over, or what they are to be read from."""
    collate = default_collate
    if isinstance(given, DataLoader):
        collate, given = given.collate_fn, given.dataset  # client.batch_size says how large batches are
    kind = type(given).__name__
    if isinstance(given, IterableDataset):
        _refuse(name, f"is a {kind}, which has no length", "read it once and hand over (x, y)")
    if isinstance(given, Read):
        return given
    if isinstance(given, Samples):
        return given.x, given.y
    if is_hf(given):
        return columns(name, given) if collate is default_collate else read_rows(name, given, collate)
    if collate is default_collate and (tensors := _tensors(given)) is not None:
        *inputs, last = tensors
        return (inputs[0] if len(inputs) == 1 else tuple(inputs), last) if inputs else (last, None)
    if isinstance(given, tuple | list):
        if len(given) != 2:
            _refuse(name, f"is a {kind} of {len(given)}", "hand over (x, y), or (x, None) without targets")
        return given[0], given[1]
    if isinstance(given, Mapping):
        return (given["x"], given["y"]) if set(given) == {"x", "y"} else (given, None)
    if _pandas(given):
        _refuse(name, f"is a {kind}", "hand over (frame[features], frame[label])")
    if isinstance(given, Tensor | np.ndarray | str | bytes) or not hasattr(given, "__getitem__"):
        _refuse(
            name, f"is {kind}", "hand over (x, y), inputs and targets; (x, None) where there are no targets"
        )
    return read_rows(name, given, collate)


def _tensors(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of data sets that are nothing else, or parts of such."""
    if isinstance(data, TensorDataset):
        return data.tensors
    if isinstance(data, Subset):
        whole = _tensors(data.dataset)
        return None if whole is None else tuple(t[torch.as_tensor(data.indices)] for t in whole)
    if isinstance(data, ConcatDataset):
        parts = [_tensors(d) for d in data.datasets]
        known = [p for p in parts if p is not None and len(p) == len(parts[0] or ())]
        return tuple(map(torch.cat, zip(*known, strict=True))) if len(known) == len(parts) else None
    return None


def read_rows(name: str, data: Any, collate: Any = default_collate) -> Read:
    """A map-style data set, tried on its first samples."""
    kind = type(data).__name__
    if not hasattr(data, "__len__"):
        _refuse(name, f"is a {kind}, which has no length", "read it once and hand over (x, y)")
    found = Read(data, collate)
    if len(data):
        try:
            found.take(torch.arange(min(2, len(data))))
        except Exception as error:  # whatever its code or collate_fn raises
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _refuse(
                name,
                f"is a {kind} whose first samples make no batch ({said})",
                "pad them in a collate_fn: hand over DataLoader(data, collate_fn=...)",
            )
    return found


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
        _refuse(what, "is a list of dicts", "hand over one dict with an array (n, ...) by each name")
    try:
        cells = [row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row) for row in rows]
    except (ValueError, TypeError) as error:
        _refuse(what, f"is a list that is no array ({error})", "hand over an array (n, ...)")
    for i, cell in enumerate(cells):
        if cell.shape != cells[0].shape:
            _refuse(
                f"{what}, row {i}",
                f"has shape {cell.shape}, row 0 has {cells[0].shape}",
                "pad or cut the rows to one shape, or hand over a torch Dataset in DataLoader(data, collate_fn=...)",
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
