"""Hugging Face data sets (extra ``fedsim[hub]``): rows read by lists of columns, from the hub, a folder or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.data.dataset import Augment, Dataset
from fedsim.data.splitfiles import read
from fedsim.data.textcolumns import TOKENS, stacked, tokenised
from fedsim.data.trees import Tree
from fedsim.errors import DataError, hint

LABELS = ("label", "labels", "target", "y")  # columns that are targets where none is named


@dataclass(frozen=True, eq=False)
class Columns:
    """Samples in a ``datasets.Dataset``: inputs are the columns ``x`` (a dict, or the only one), targets the column
    ``y``. ``labels`` are its class ids, if it holds such, and take its place where they are ``named``; ``words`` (N,)
    is what it holds as text or floats, until that has ids."""

    data: Any
    x: tuple[str, ...]
    y: str | None = None
    labels: Tensor | None = None
    device: str = "cpu"
    words: np.ndarray | None = None
    named: bool = False
    sliceable: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: Tensor) -> tuple[Tree, Tree]:
        """See ``SamplesLike``.

        Raises:
            DataError: if rows of a column have several lengths, or are no numbers.
        """
        ids = self.labels[rows].to(self.device) if self.named and self.labels is not None else None
        names = [*self.x, *((self.y,) if self.y and ids is None else ())]
        stated = self.data.format
        options = stated["format_kwargs"] if stated["type"] == "torch" else {}
        try:
            found = self.data.with_format("torch", columns=names, **options)[rows.tolist()]
        except TypeError as error:  # torch has no such type, of dates for one
            raise DataError(
                f"data: of the columns {', '.join(names)} one holds no numbers ({error})"
            ) from error
        for name in names:
            found[name] = stacked(name, found[name]).to(self.device)
        x = found[self.x[0]] if len(self.x) == 1 else {name: found[name] for name in self.x}
        return x, (found[self.y] if self.y and ids is None else ids)

    def items(self, rows: list[int]) -> list[Any]:
        """Rows as dicts, as they are stored."""
        found = self.data[rows]
        return [{k: v[i] for k, v in found.items()} for i in range(len(rows))]

    def to(self, device: str) -> Columns:
        """See ``SamplesLike``."""
        return replace(self, device=device)


def is_hf(value: Any) -> bool:
    """Whether ``value`` is a ``datasets.Dataset``; does not import that library."""
    kinds = [f"{k.__module__.partition('.')[0]}.{k.__name__}" for k in type(value).__mro__]
    return "datasets.Dataset" in kinds


def shown(name: str, data: Any) -> list[str]:
    """The columns that a data set's format shows; a transform of the user's is refused."""
    stated = data.format
    if stated["type"] == "custom" or (stated["format_kwargs"] and stated["type"] != "torch"):
        what = (
            "a transform (set_transform, with_transform)"
            if stated["type"] == "custom"
            else "a format of its own"
        )
        raise DataError(
            f"{name}: its rows go through {what}, which would not be applied; apply it with data.map(...) and "
            "reset_format(), or hand over DataLoader(data, collate_fn=...)"
        )
    return list(data.column_names if stated["output_all_columns"] else stated["columns"])


def columns(name: str, data: Any, x: Sequence[str] | str | None = None, y: str | None = None) -> Columns:
    """A data set's columns as inputs and targets; by default ``y`` is the one called label, and ``x`` the others.

    Raises:
        DataError: naming the column that is missing, or no numbers.
    """
    names, seen = list(data.column_names), shown(name, data)
    y = y if y is not None else next((c for c in LABELS if c in seen), None)
    chosen = [x] if isinstance(x, str) else [c for c in seen if c != y] if x is None else list(x)
    for column in (*chosen, *((y,) if y else ())):
        if column not in names:
            raise DataError(
                f"{name}: has no column '{column}'{hint(column, names)}; it has {', '.join(names)}"
            )
    labels = words = None
    if y is not None and len(data):
        held = np.asarray(data.with_format("numpy", columns=[y])[:][y])
        if held.ndim == 1 and held.dtype.kind in "iub":
            labels = torch.from_numpy(held.astype(np.int64))
        elif held.ndim == 1 and held.dtype.kind == "f":
            words = held
        elif held.ndim == 1 and all(isinstance(word, str) for word in held.tolist()):
            words = held.astype(str)
    made = Columns(data, tuple(chosen), y, labels, words=words)
    if len(data):
        replace(made, y=y if words is None or words.dtype.kind == "f" else None).take(
            torch.arange(min(2, len(data)))
        )
    return made


def from_hf(
    data: Any,
    *,
    x: Sequence[str] | str | None = None,
    y: str | None = None,
    client: str | None = None,
    domain: str | None = None,
    test: Any = None,
    augment: Augment | None = None,
    name: str = "data",
) -> Dataset:
    """A ``datasets.Dataset`` as the ``data`` of ``fedsim.simulate``; for arguments see ``load``.

    Raises:
        DataError: naming the column that is missing or holds no numbers.
    """
    stated = [c for c in (client, domain) if c]
    for column in stated:
        if column not in data.column_names:
            raise DataError(f"{name} has no column '{column}'{hint(column, data.column_names)}")
    if x is None:
        seen = shown(name, data)
        label = y or next((c for c in LABELS if c in seen), None)
        x = [c for c in seen if c not in (*stated, label)]
    made = columns(name, data, x, y)
    kept = {"train": data} | ({"test": test} if test is not None else {})
    names = _names(kept, domain) if domain else ()
    groups = {part: {"domain": _codes(rows, domain, names)} for part, rows in kept.items()} if domain else {}
    return Dataset(
        made,
        None if test is None else columns(f"{name}, the test set", test, x, made.y),
        classes=_classes(data, made),
        augment=augment,
        ids=_codes(data, client, _names({"": data}, client)) if client else None,
        groups=groups,
        group_names={"domain": names} if domain else {},
    )


def load(
    *,
    path: str,
    split: str = "train",
    test_split: str | None = "test",
    x: Sequence[str] | str | None = None,
    y: str | None = None,
    client: str | None = None,
    domain: str | None = None,
    cache: str | None = None,
    augment: Augment | None = None,
    tokenizer: str | None = None,
    length: int = 64,
) -> Dataset:
    """A data set of the hub by name, saved by ``save_to_disk`` in a folder, or in files (parquet, csv, tsv, json,
    arrow).

    Args:
        path: the hub's name, a folder, or a file (a glob for several); or a folder of ``train*`` and ``test*``
            (``validation*``, ``val``, ``dev``: the split ``validation``), or with a folder ``data`` of these.
        split: rows to train on; ``test_split``: the common test set, ``null`` for none.
        x: input columns, by default all others; ``y``: the target's; ``client``, ``domain``: whose a row is.
        cache: where files are kept as arrow; by default that of ``datasets``.
        augment: applied to training batches.
        tokenizer: makes tokens of text (``fedsim.data.textcolumns``): ``byte``, or the folder of a pretrained model.
        length: tokens of a sample then.

    Raises:
        DataError: if the library or the data are not there, or a column is not.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("data=hf: needs the library datasets; type pip install 'fedsim-lab[hub]'") from error
    parts = read(datasets, path, cache, [n for n in (split, test_split) if n])
    for key, name in (("split", split), ("test_split", test_split)):
        if name not in (None, *parts) and (key, name) != ("test_split", "test"):
            raise DataError(
                f"data.{key}={name}: not in {path}{hint(str(name), parts)}; it has {', '.join(parts)}"
            )
    if tokenizer is not None:
        besides = [c for c in (y, client, domain, *(LABELS if y is None else ())) if c]
        parts = {
            k: tokenised(f"{path}, {k}", v, x, besides, tokenizer, length)
            for k, v in parts.items()
            if k in (split, test_split)
        }
        x = TOKENS
    test = parts.get(test_split or "")
    named = {"x": x, "y": y, "client": client, "domain": domain, "augment": augment}
    return from_hf(parts[split], test=test, name=path, **named)  # type: ignore[arg-type]


def _classes(data: Any, made: Columns) -> tuple[str, ...]:
    if made.y is None or made.labels is None:
        return ()
    named = getattr(data.features.get(made.y), "names", None)
    high = int(made.labels.max()) if len(made.labels) else -1
    return tuple(named) if named else tuple(map(str, range(high + 1)))


def _names(parts: Mapping[str, Any], column: str) -> tuple[str, ...]:
    known = getattr(next(iter(parts.values())).features.get(column), "names", None)
    found = {str(v) for data in parts.values() for v in data.unique(column)}
    return tuple(known) if known else tuple(sorted(found))


def _codes(data: Any, column: str, names: Sequence[str]) -> np.ndarray:
    if getattr(data.features.get(column), "names", None):
        return np.asarray(data[column], dtype=np.int64)
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[str(v)] for v in data[column]], dtype=np.int64)
