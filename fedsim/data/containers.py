"""What people hand over as a client's samples: each kind becomes one array of inputs and one of targets, or is refused.

Accepted are pairs ``(x, y)`` of tensors, NumPy arrays, nested lists, pandas frames and series, or of trees of such:
dicts, tuples, named tuples and lists (``fedsim.data.readings``). ``y`` may be ``None``. A dict of arrays alone is
inputs without targets, unless its keys are ``x`` and ``y``. Map-style ``torch.utils.data`` data sets, and loaders of
such with their ``collate_fn``, are read when their samples are needed, and so are memory-mapped arrays. What has more
than one reading is refused by client, with what to hand over instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from fedsim.data.arrays import Array, pandas_kind, refuse
from fedsim.data.arrays import array as array
from fedsim.data.dataset import Samples
from fedsim.data.huggingface import Columns, columns, is_hf
from fedsim.data.lazy import Mapped, Read
from fedsim.data.readings import Reading, sizes_of
from fedsim.data.trees import leaves
from fedsim.errors import DataError

Whole = Samples | TensorDataset  # where a tuple is never a list of samples


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
    if isinstance(clients, Tensor | np.ndarray | DataLoader | str | bytes) or pandas_kind(clients):
        raise DataError(
            f"clients: got a {type(clients).__name__}; expected a list with one (x, y) pair per client"
        )
    if not isinstance(clients, Iterable):
        raise DataError(
            f"clients: got {type(clients).__name__}; expected a list with one (x, y) pair per client"
        )
    return list(clients)


def part(name: str, given: Any, like: Any = None) -> Part:
    """The samples that ``given`` holds; ``name`` says whose they are.

    ``like`` are another participant's inputs and targets, whose reading counts where ``given`` has two.

    Raises:
        DataError: for a kind that has no single reading; says whose it is and what to hand over.
    """
    return _part(name, given, like)[0]


def parts(given: Mapping[str, Any]) -> list[Part]:
    """The samples of several participants by name, each read as ``part`` does, all of them alike.

    Raises:
        DataError: see ``part``.
    """
    found = [_part(name, one) for name, one in given.items()]
    if all(sure for _, sure in found):
        return [own for own, _ in found]
    like = next(((own.x, own.y) for own, sure in found if sure and own.read is None and len(own)), None)
    if like is None and len({np.shape(own.x)[1:] for own, _ in found if isinstance(own.x, Array)}) > 1:
        like = ([None] * len(found[0][0]), None)  # no samples of one shape: then they are several inputs
    return [own if sure or like is None else part(own.name, given[own.name], like) for own, sure in found]


def _part(name: str, given: Any, like: Any = None) -> tuple[Part, bool]:
    """One participant's, and whether it had a single reading."""
    found = _pair(name, given)
    if isinstance(found, Read | Columns):
        return Part(name, None, None, read=found), True
    x, y = found
    columns = tuple(map(str, x.columns)) if pandas_kind(x) == "DataFrame" else ()
    if pandas_kind(x) and pandas_kind(y) and _reordered(x, y):
        refuse(
            name,
            "has x and y with one index in two orders, but rows go together by position",
            "hand over y.loc[x.index], or both with .reset_index(drop=True) if the positions are right",
        )
    known = [s for s in map(sizes_of, (x, y)) if s is not None]
    reader = Reading(frozenset.intersection(*known) or None if known else None, isinstance(given, Whole))
    own = like or (None, None)
    targets = None if y is None else reader.tree(f"{name}, y", y, own[1])
    if isinstance(targets, Mapped) and math.prod(targets.shape[1:]) == 1:
        targets = targets.take(torch.arange(len(targets)))  # one value a sample: read by the rules of targets
    return Part(name, reader.tree(f"{name}, x", x, own[0]), targets, columns), reader.sure


def _reordered(x: Any, y: Any) -> bool:
    """Whether two of pandas have the same labels of rows, each once, in another order."""
    a, b = getattr(x, "index", x), getattr(y, "index", y)
    if len(a) != len(b) or a.equals(b) or not (a.is_unique and b.is_unique):
        return False
    return bool(a.isin(b).all())


def first_size(tree: Any) -> int:
    """Entries of the first array of a tree."""
    while isinstance(tree, Mapping | tuple | list):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree), ())
    return len(tree) if tree is not None else 0


def _pair(name: str, given: Any) -> tuple[Any, Any] | Read | Columns:
    """The two halves of what a client hands over, or what they are to be read from."""
    collate, loader = default_collate, isinstance(given, DataLoader)
    if loader:
        collate, given = (
            given.collate_fn,
            _chosen(name, given),
        )  # client.batch_size says how large batches are
    kind = type(given).__name__
    if isinstance(given, IterableDataset):
        refuse(name, f"is a {kind}, which has no length", "read it once and hand over (x, y)")
    if isinstance(given, Read):
        return given
    if isinstance(given, Samples):
        return given.x, given.y
    if is_hf(given):
        return columns(name, given) if collate is default_collate else read_rows(name, given, collate)
    if isinstance(given, Subset) and hasattr(given.dataset, "__len__"):
        n = len(given.dataset)
        if (odd := next((i for i in given.indices if not -n <= i < n), None)) is not None:
            refuse(name, f"is a Subset with row {odd} of {n} samples", f"use rows from 0 to {n - 1}")
    if collate is default_collate and (tensors := _tensors(given)) is not None:
        *inputs, last = tensors
        return (inputs[0] if len(inputs) == 1 else tuple(inputs), last) if inputs else (last, None)
    if isinstance(given, tuple | list) and not loader:
        if len(given) != 2:
            way = "hand over (x, y), or (x, None) without targets; samples one by one as DataLoader(samples)"
            refuse(name, f"is a {kind} of {len(given)}", way)
        return given[0], given[1]
    if kind in ("DatasetDict", "IterableDatasetDict"):  # of Hugging Face
        first, *more = [f"data[{split!r}]" for split in given]
        refuse(name, f"is a {kind} of {len(given)} splits", f"hand over {', test='.join([first, *more[:1]])}")
    if isinstance(given, Mapping) and not loader:
        return halves(given)
    if pandas_kind(given):
        refuse(
            name,
            f"is a {kind}",
            "hand over (frame[features], frame[label]), or fedsim.data.frames.from_frame(frame, y=label)",
        )
    if isinstance(given, Tensor | np.ndarray | str | bytes) or not hasattr(given, "__getitem__"):
        refuse(
            name, f"is {kind}", "hand over (x, y), inputs and targets; (x, None) where there are no targets"
        )
    return read_rows(name, given, collate)


def halves(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """Inputs and targets in a dict: under these names, or inputs alone."""
    return (given["x"], given["y"]) if set(given) == {"x", "y"} else (given, None)


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether it holds arrays by name, and not the samples of several domains."""
    return any(isinstance(v, Tensor | np.ndarray) or pandas_kind(v) for v in given.values())


def _chosen(name: str, loader: Any) -> Any:
    """The samples that a loader goes through in an epoch, each once."""
    data, sampler, batches = loader.dataset, loader.sampler, loader.batch_sampler
    if isinstance(data, IterableDataset):
        return data
    if batches is not None:
        sampler = batches.sampler if type(batches) is BatchSampler else batches
    if type(loader).__iter__ is not DataLoader.__iter__:
        sampler = loader
    kind = type(sampler)
    if kind is SubsetRandomSampler:
        rows = list(sampler.indices)
        return data.select(rows) if is_hf(data) else Subset(data, rows)
    drawn = kind is RandomSampler and (sampler.replacement or sampler._num_samples is not None)
    if drawn or kind not in (SequentialSampler, RandomSampler):
        refuse(
            name,
            f"is a DataLoader with {kind.__name__}, but a client's epoch goes through all its samples, shuffled",
            "hand over the samples it should have, e.g. Subset(data, rows), and weigh them in the loss",
        )
    return data


def _plainly(data: Any, kind: type) -> bool:
    """Whether ``data`` is of ``kind`` and gives its samples as that does."""
    methods = ("__getitem__", "__getitems__", "__len__")
    return isinstance(data, kind) and all(
        getattr(type(data), m, None) is getattr(kind, m, None) for m in methods
    )


def _tensors(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of data sets that are nothing else, or parts of such."""
    if _plainly(data, TensorDataset):
        held: tuple[Tensor, ...] = data.tensors
        return held
    if _plainly(data, Subset):
        whole = _tensors(data.dataset)
        return None if whole is None else tuple(_view(t, torch.as_tensor(data.indices)) for t in whole)
    if _plainly(data, ConcatDataset):
        parts = [_tensors(d) for d in data.datasets]
        known = [p for p in parts if p is not None and len(p) == len(parts[0] or ())]
        return tuple(map(torch.cat, zip(*known, strict=True))) if len(known) == len(parts) else None
    return None


def _view(whole: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of ``whole``: where they lie one after the other a view, no copy."""
    start, count = int(rows[0]) if len(rows) else 0, len(rows)
    plain = rows.dim() == 1 and not rows.is_floating_point() and 0 <= start <= len(whole) - count
    if (
        plain
        and rows.dtype != torch.bool
        and torch.equal(rows, torch.arange(start, start + count, dtype=rows.dtype))
    ):
        return whole[start : start + count]
    return whole[rows]


def read_rows(name: str, data: Any, collate: Any = default_collate) -> Read:
    """A map-style data set, tried on its first samples."""
    kind = type(data).__name__
    if not hasattr(data, "__len__"):
        refuse(name, f"is a {kind}, which has no length", "read it once and hand over (x, y)")
    found = Read(data, collate)
    if len(data):
        try:
            first = found.take(torch.arange(min(2, len(data))))
        except Exception as error:  # whatever its code or collate_fn raises
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            way = (
                "give the data set a transform that makes tensors (torchvision.transforms.v2.functional.pil_to_tensor)"
                if "PIL." in said
                else "pad them in a collate_fn: hand over DataLoader(data, collate_fn=...)"
            )
            refuse(name, f"is a {kind} whose first samples make no batch ({said})", way)
        if any(isinstance(t, Tensor) and t.is_nested for t in leaves(first)):
            refuse(name, f"is a {kind} whose batches are nested tensors", "pad them in the collate_fn")
    return found
