"""The one door through which all samples pass: inputs and targets in types that a run can use, checked once.

Samples that are handed over (``admit_parts``) and those of a configured source, at a server or at a deployment's node
(``admit``), follow the same rules. What already has its final form stays as it is, without a copy.

Inputs: floats of any width stay and are read in the run's dtype; bytes are numbers 0..255; bool becomes 0 and 1; other
integers stay, for models that look them up (``fedsim.run.trial`` makes them numbers for models that cannot).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedsim.data.containers import Part
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.finite import first_nonfinite, single
from fedsim.data.huggingface import Columns
from fedsim.data.joining import admit_columns, admit_trees
from fedsim.data.labels import FEW, TargetRules, as_names, as_numbers, targets
from fedsim.data.lazy import Mapped, Parts
from fedsim.data.local import LocalData
from fedsim.data.shards import Shards
from fedsim.data.trees import named_leaves
from fedsim.errors import ConfigError, DataError

Pairs = list[tuple[Any, Any]]
SEARCHED = 20_000  # samples of a client that are read again to find what was not finite
AT_FIRST = (
    "its loss was NaN before its first step: look at the loss and the model (log of 0, 0 / 0, sqrt of less)"
)


def settled(pairs: Sequence[Any]) -> tuple[str, ...] | None:
    """The names of the classes if all ``pairs`` are tensors in their final form: floats or bytes (n, ...) and ids (n,).

    One quick look at each pair, for populations of many clients; ``None`` if anything has to be read or refused.
    """
    if not pairs or type(pairs[0]) is not tuple or not all(isinstance(t, Tensor) for t in pairs[0]):
        return None
    if pairs[0][0].is_nested:
        return None
    dtype, shape = pairs[0][0].dtype, pairs[0][0].shape[1:]
    if not dtype.is_floating_point and dtype != torch.uint8:
        return None
    for pair in pairs:
        if (
            type(pair) is not tuple
            or len(pair) != 2
            or type(pair[0]) is not Tensor
            or type(pair[1]) is not Tensor
        ):
            return None
        (x, y), n = pair, pair[1].shape
        if x.dtype != dtype or y.dtype != torch.int64 or x.shape != (*n, *shape) or len(n) != 1:
            return None
        if x.requires_grad or x.layout != torch.strided or x.is_nested or not (x.is_cpu and y.is_cpu):
            return None
    every = torch.cat([y for _, y in pairs])
    low, high = (int(every.min()), int(every.max())) if len(every) else (-1, -1)
    return as_names(high) if low == 0 and high < max(len(every), FEW) else None


def admit_parts(parts: Sequence[Part], rules: TargetRules) -> tuple[Pairs, tuple[str, ...]]:
    """Inputs and targets of all participants, each of one type, and the names of the classes.

    Raises:
        ConfigError: shapes do not agree. DataError: values cannot be used; both say whose and which row.
    """
    theirs = [len(part) for part in parts if part.name.startswith(("client ", "data"))]
    if theirs and not any(theirs):
        warnings.warn("clients: none of them has a sample, so nothing is trained", stacklevel=2)
    if not all(part.plain for part in parts):
        return admit_trees(parts, rules, _inputs)
    _check_shapes(parts, rules.own_loss)
    ys, classes = targets([p.name for p in parts], [p.y for p in parts], rules)
    xs = _inputs(parts)
    for part, x in zip(parts, xs, strict=True):
        if part.columns or not part.name.startswith("client "):
            refuse_nonfinite(part.name, x, part.columns)  # other clients: all at once, in ``check_owned``
    return list(zip(xs, ys, strict=True)), classes


def admit(data: Dataset, rules: TargetRules) -> Dataset:
    """The data set of a source with inputs and targets as a run needs them.

    Test inputs are checked to be finite here, training inputs in ``check_owned``, where it is known whose they are.
    """
    if isinstance(data.train, Columns) and isinstance(data.test, Columns | None):
        return admit_columns(data, rules)
    plain = [p for p in (data.train, data.test) if isinstance(p, Samples) and _is_pair(p)]
    if len(plain) < 1 + (data.test is not None):
        return data  # trees, files and data sets come as their source made them
    labels = plain[0].y
    known = data.classes if labels.dim() == 1 or labels.shape[1:] == (1,) else ()
    given = dict(zip(("the training set", "the test set"), plain, strict=False))
    for name, part in given.items():
        for what, t in (("x", part.x), ("y", part.y)):
            if not isinstance(t, Tensor):
                raise DataError(
                    f"{name}: {what} is {type(t).__name__}; a data source gives tensors (Samples)"
                )
        if len(part.x) != len(part.y):
            raise DataError(f"{name}: x has {len(part.x)} samples, y has {len(part.y)}")
    if rules.kind == "numbers" and known and known != as_names(len(known) - 1):
        given = {name: Samples(part.x, as_numbers(part.y, known)) for name, part in given.items()}
        known = ()
    parts = [Part(name, part.x, part.y) for name, part in given.items()]
    ys, classes = targets(list(given), [p.y for p in parts], replace(rules, known=known))
    xs = _inputs(parts)
    if data.test is not None:
        refuse_nonfinite("the test set", xs[1])
    made = [Samples(x, y) for x, y in zip(xs, ys, strict=True)]
    same = all(a.x is b.x and a.y is b.y for a, b in zip(made, given.values(), strict=True))
    if same and classes == data.classes:
        return data
    return replace(
        data, train=made[0], test=made[1] if data.test is not None else None, classes=classes or data.classes
    )


def check_owned(data: Dataset, shards: Shards) -> None:
    """Refuse training inputs that are not finite, naming the client that holds them.

    Raises:
        DataError: names client, row of the training set, and column or pixel.
    """
    if not isinstance(data.train, Samples):
        return
    for key, x in named_leaves(data.train.x):
        for start, piece in _pieces(x):
            if (row := first_nonfinite(piece)) is not None:
                _refuse(shards.whose(start + row) + (f", {key}" if key else ""), piece, row)


def refuse_nonfinite(name: str, x: Tensor, columns: Sequence[str] = ()) -> None:
    """Refuse inputs (n, ...) with NaN or infinity; one pass over ``x``.

    Raises:
        DataError: names the row, and the column, or channel and pixel.
    """
    row = first_nonfinite(x)
    if row is not None:
        _refuse(f"{name}, row {row}", x, row, columns)


def remedy(data: LocalData, first_loss: float = 0.0) -> str:
    """What to do about a client whose update is not finite: ``blamed``, or a smaller step."""
    return _blamed(data, first_loss) or "a smaller client.lr may help"


def _blamed(data: LocalData, first_loss: float) -> str:
    """Which of its samples are the cause, or that its loss was NaN before it had learned anything; empty if neither.

    Inputs that lie in memory were looked at when the run began: others are read for it.
    """
    y = data.samples.labels
    if y is not None and y.is_floating_point():
        bad = ~torch.isfinite(y[data.index.to(y.device)])
        if bool(bad.any()):
            row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
            return f"the target of its row {row} is NaN or infinite: fill or drop it, or let the loss leave it out"
    for rows in torch.split(torch.arange(min(len(data), SEARCHED)), 512):
        for key, x in named_leaves(data.read(rows).x):  # as they are read, and in the run's type
            if (at := first_nonfinite(x)) is not None:
                place, shown = _place(x, at, ())
                return f"{key + ' of ' if key else ''}its row {int(rows[at])}, {place}, is {shown}: fill or drop it"
    return "" if first_loss == first_loss else AT_FIRST


def _refuse(whose: str, x: Tensor, row: int, columns: Sequence[str] = ()) -> NoReturn:
    """Name the first value of sample ``row`` that is not finite."""
    where, shown = _place(x, row, columns)
    raise DataError(f"{whose}, {where}: the value is {shown}; fill or drop it")


def _place(x: Tensor, row: int, columns: Sequence[str]) -> tuple[str, str]:
    """Where the first value of sample ``row`` that is not finite stands, and what it is."""
    bad = (~torch.isfinite(single(x[row]))).nonzero()[0].tolist()
    value = float(x[(row, *bad)])
    if len(bad) == 3:
        where = f"channel {bad[0]}, pixel row {bad[1]}, pixel column {bad[2]}"
    elif len(bad) == 1:
        where = f"column {columns[bad[0]]!r}" if columns else f"column {bad[0]}"
    else:
        where = f"entry {tuple(bad)}"
    if value == value and abs(value) != float("inf"):
        return where, f"{value:g}, infinite in float32"
    return where, "NaN" if value != value else "infinite"


def _is_pair(samples: Samples) -> bool:
    """Whether inputs and targets are one array each, or so wrong that it must be said."""
    return not any(
        isinstance(t, Mapping | tuple | list | Mapped | Parts) or t is None for t in (samples.x, samples.y)
    )


def _pieces(x: Any) -> list[tuple[int, Tensor]]:
    """What of ``x`` (n, ...) lies in memory, with the row it starts at."""
    if isinstance(x, Parts):
        return list(zip(x.ends.tolist(), x.parts, strict=False))
    return [(0, x)] if isinstance(x, Tensor) else []


def _check_shapes(parts: Sequence[Part], own_loss: bool) -> None:
    """All samples have the shapes of those of the first participant that has any; labels may be (n,) or (n, 1)."""

    def shapes_of(p: Part) -> list[tuple[int, ...]]:
        x, y = tuple(p.x.shape[1:]), tuple(p.y.shape[1:])
        return [x, () if y == (1,) and not own_loss else y]

    first = next((p for p in parts if len(p.x)), parts[0])
    shapes = shapes_of(first)
    for p in parts:
        if len(p.x) != len(p.y):
            raise ConfigError(f"{_key(p.name)}: x has {len(p.x)} samples, y has {len(p.y)}")
        if p.columns and first.columns and sorted(p.columns) != sorted(first.columns):
            odd = sorted(set(p.columns) ^ set(first.columns))[0]
            raise DataError(f"{p.name}: its columns are not those of {first.name}: {odd!r} is in one only")
        own = shapes_of(p)
        if len(p.x) and own != shapes:
            at = 0 if own[0] != shapes[0] else 1
            what = ("samples", "targets")[at]
            raise ConfigError(f"{_key(p.name)}: {what} of shape {own[at]}, {first.name} has {shapes[at]}")


def _key(name: str) -> str:
    """``clients[3]`` for ``client 3``."""
    word, _, number = name.partition(" ")
    return f"clients[{number}]" if word == "client" and number.isdigit() else name


def _inputs(parts: Sequence[Part]) -> list[Any]:
    """Inputs of all participants in one type; empty ones take the shape and type of the others."""
    xs: list[Any] = []
    for p in parts:
        x: Any = p.x
        if isinstance(x, Mapped):
            xs.append(x)
            continue
        if isinstance(x, np.ndarray):
            if len(x):
                raise DataError(
                    f"{p.name}: inputs are text ({str(x.reshape(-1)[0])!r}); turn them into numbers"
                )
            x = torch.zeros(x.shape)
        if x.is_complex():
            raise DataError(f"{p.name}: inputs are complex numbers; hand over real and imaginary parts")
        xs.append(x.view(torch.uint8) if x.dtype == torch.bool else x)
    full = [i for i, x in enumerate(xs) if len(x)]
    if not full:
        return xs
    first = parts[full[0]]
    if first.columns:
        xs = [_ordered(x, p.columns, first.columns) for x, p in zip(xs, parts, strict=True)]
    dtype = xs[full[0]].dtype
    for i in full:
        bytes_of = (dtype == torch.uint8) != (xs[i].dtype == torch.uint8)
        flags = torch.bool in (getattr(first.x, "dtype", None), getattr(parts[i].x, "dtype", None))
        if bytes_of and not flags:
            raise DataError(
                f"{parts[i].name}: inputs are {_type(xs[i])}, those of {first.name} {_type(xs[full[0]])}: are they on "
                "one scale? Convert one of them"
            )
        dtype = torch.promote_types(dtype, xs[i].dtype)
    if any(isinstance(x, Mapped) for x in xs):
        return xs
    empty = xs[full[0]][:0].to(dtype)
    return [x.to(dtype) if len(x) else empty for x in xs]


def _ordered(x: Tensor, columns: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Columns of a frame in the order of the first one's."""
    if not columns or tuple(columns) == tuple(wanted):
        return x
    return x[:, [list(columns).index(name) for name in wanted]]


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
