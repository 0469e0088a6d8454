"""Targets as people have them become what the loss takes: class ids 0..C-1 with names, probabilities, or numbers.

The rules are the same for all sources. Without a loss of one's own (cross entropy):

* integers of any width, bool and whole floats (n,) or (n, 1) are class ids. Ids that are 0..C-1 stay as they are.
  Text, -1/+1, and ids that start above 0 and do not fit the model as they are, are numbered in sorted order.
* -100 (cross entropy's mark for "ignore") is refused in (n,): drop such rows. In sequences (n, T) it stays.
* floats (n, C) whose rows are probabilities stay; other floats are numbers to be predicted, and need a loss.

With a loss of one's own numbers keep their values, since only that loss knows what they mean: NaN too, which is named
in the log, since a loss may leave missing targets out. Tasks whose loss is known say what their targets are (``kind``):
``numbers`` are no text and finite, ``labels`` are 0 and 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedsim.data.arrays import Array
from fedsim.errors import DataError

IGNORED = -100  # what torch's cross entropy leaves out
FEW = 50  # distinct values that are classes without further question
MANY = 1 << 20  # classes beyond which ids are numbered anew, so that their range costs nothing
LOSS = "type task=regression, or give fedsim.simulate a loss=..., such as torch.nn.functional.mse_loss"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetRules:
    """How targets are to be read.

    ``own_loss``: the user brought a loss. ``known``: names of the classes, where the source says them; targets must
    then be 0..C-1. ``outputs()``: how many classes the given model tells apart; ``None`` where it follows the data.
    """

    own_loss: bool = False
    known: tuple[str, ...] = ()
    outputs: Callable[[], int | None] = lambda: None
    kind: str = ""  # of targets that keep their values: "numbers", "labels" (0 and 1), or any


def targets(
    names: Sequence[str], parts: Sequence[Array], rules: TargetRules
) -> tuple[list[Tensor], tuple[str, ...]]:
    """The targets of all participants as tensors of one type, and the names of the classes (empty: no classes).

    Args:
        names: whose each part is, for messages.
        parts: targets (n_i, ...); empty ones have no say.
        rules: see there.

    Raises:
        DataError: by participant, row and remedy, for what can be no target.
    """
    filled = [i for i, p in enumerate(parts) if len(p)]
    if not filled:
        return [torch.zeros(0, dtype=torch.int64) for _ in parts], rules.known
    whose, full = [names[i] for i in filled], [parts[i] for i in filled]
    texts = [isinstance(p, np.ndarray) for p in full]
    if any(texts):
        if rules.kind:
            wanted = "numbers to be predicted" if rules.kind == "numbers" else "0 and 1"
            raise DataError(
                f"{whose[texts.index(True)]}: targets are text, but this task takes {wanted}; turn them into those "
                "(.astype(float)), or leave out task=... if they are classes"
            )
        found, classes = _named(whose, full, texts)
    else:
        found, classes = _numbers(whose, [torch.as_tensor(p) for p in full], rules)
    empty = found[0][:0]
    out = dict(zip(filled, found, strict=True))
    return [out.get(i, empty) for i in range(len(parts))], rules.known or classes


def _named(
    names: Sequence[str], parts: Sequence[Any], texts: Sequence[bool]
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Class names as ids in sorted order; one numbering for everybody."""
    if not all(texts):
        a, b = names[texts.index(True)], names[texts.index(False)]
        raise DataError(f"{a} has labels as text, {b} as numbers; give all of them in one way")
    flat = [p.reshape(-1) if p.shape[1:] == (1,) else p for p in parts]
    for name, p in zip(names, flat, strict=True):
        if p.ndim != 1:
            raise DataError(f"{name}: labels as text have shape {p.shape}; expected one per sample, (n,)")
        if (blank := np.flatnonzero(np.char.strip(p) == "")).size:
            raise DataError(f"{name}, row {blank[0]}: the label is empty; fill or drop that row")
    known = np.unique(np.concatenate(flat))
    return [torch.from_numpy(np.searchsorted(known, p)) for p in flat], tuple(map(str, known))


def _numbers(
    names: Sequence[str], parts: list[Tensor], rules: TargetRules
) -> tuple[list[Tensor], tuple[str, ...]]:
    for name, p in zip(names, parts, strict=True):
        if p.is_complex():
            raise DataError(f"{name}: targets are complex numbers; hand over real ones")
        if p.is_floating_point() and not torch.isfinite(p.sum()) and not bool(torch.isfinite(p).all()):
            row = _first(~torch.isfinite(p))
            if not rules.own_loss or rules.kind:
                raise DataError(f"{name}, row {row}: the target is {_shown(p[row])}; fill or drop that row")
            log.warning("%s, row %d: the target is %s; the loss must leave it out", name, row, _shown(p[row]))
    if rules.kind == "labels":
        _check_zero_one(names, parts)
    if not rules.own_loss:
        parts = [p.reshape(-1) if p.shape[1:] == (1,) else p for p in parts]
    if any(p.is_floating_point() for p in parts):
        if rules.own_loss:
            dtype = parts[0].dtype
            for p in parts:
                dtype = torch.promote_types(dtype, p.dtype)
            return [p.to(dtype) for p in parts], ()
        if parts[0].dim() != 1:
            return _probabilities(names, parts)
        _check_whole(names, parts)
    if parts[0].dim() == 1:
        return _class_ids(names, [p.long() for p in parts], rules)
    if not rules.own_loss:
        _check_sequences(names, parts)
    same = len({p.dtype for p in parts}) == 1
    return (parts if rules.own_loss and same else [p.long() for p in parts]), ()


def _class_ids(
    names: Sequence[str], parts: list[Tensor], rules: TargetRules
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Ids (n,) int64 as they are if they can be 0..C-1, else numbered in sorted order."""
    every = torch.cat(parts)
    low, high, total = int(every.min()), int(every.max()), len(every)
    if rules.known:
        _check_known(names, parts, low, high, rules.known)
        return parts, rules.known
    if (
        rules.own_loss
    ):  # values mean what the loss says; they are counted as classes where they can be classes
        return parts, as_names(high) if low >= 0 and high < max(total, FEW) else ()
    if low < 0 and not _signs(parts, low, high):
        _refuse_negative(names, parts)
    if low == 0 and high < max(total, FEW):
        return parts, as_names(high)
    fits = low >= 0 and (rules.outputs() or 0) > high
    if fits:
        return parts, as_names(high)
    distinct = torch.unique(every)
    if len(distinct) > FEW and 2 * len(distinct) > total:
        raise DataError(
            f"targets are integers with {len(distinct)} different values in {total} samples: numbers to be predicted "
            f"rather than classes? Then {LOSS}; if they are classes, number them from 0 and give a model with as many "
            "outputs"
        )
    if low == 0 and high < MANY:
        return parts, as_names(high)
    shown = ", ".join(map(str, distinct[:5].tolist())) + (", ..." if len(distinct) > 5 else "")
    log.warning("labels %s became the classes 0 to %d, in this order", shown, len(distinct) - 1)
    return [torch.searchsorted(distinct, p) for p in parts], tuple(map(str, distinct.tolist()))


def as_names(high: int) -> tuple[str, ...]:
    """Names of the classes 0 to ``high``: their numbers."""
    return tuple(map(str, range(high + 1)))


def _signs(parts: Sequence[Tensor], low: int, high: int) -> bool:
    """Whether labels are -1 and +1, the two classes of older binary sets."""
    return low == -1 and high == 1 and all(bool((p != 0).all()) for p in parts)


def _refuse_negative(names: Sequence[str], parts: Sequence[Tensor]) -> NoReturn:
    ignored = [bool((p == IGNORED).any()) for p in parts]
    at = ignored.index(True) if any(ignored) else next(i for i, p in enumerate(parts) if int(p.min()) < 0)
    p, name = parts[at], names[at]
    row = _first(p == IGNORED if ignored[at] else p < 0)
    if ignored[at]:
        raise DataError(f"{name}, row {row}: label -100 (ignore); drop the rows that are to be ignored")
    raise DataError(
        f"{name}, row {row}: label {int(p[row])}; classes are numbered from 0 (or are -1 and +1 throughout). Drop rows "
        "without a label, or number the classes anew"
    )


def _check_known(
    names: Sequence[str], parts: Sequence[Tensor], low: int, high: int, known: Sequence[str]
) -> None:
    """Refuse ids outside 0..C-1 where the source names C classes."""
    if low >= 0 and high < len(known):
        return
    for name, p in zip(names, parts, strict=True):
        if bool((bad := (p < 0) | (p >= len(known))).any()):
            row = _first(bad)
            raise DataError(
                f"{name}, row {row}: label {int(p[row])}; the data set names {len(known)} classes, so labels must be 0 "
                f"to {len(known) - 1}"
            )


def _check_zero_one(names: Sequence[str], parts: Sequence[Tensor]) -> None:
    """Refuse what is no probability of a label: binary cross entropy would compute something of it."""
    for name, p in zip(names, parts, strict=True):
        if bool((bad := (p < 0) | (p > 1)).any()):
            row = _first(bad)
            value = _shown(p[row][bad[row]].reshape(-1)[0])
            signs = "; of -1 and +1 make (y > 0)" if float(value) == -1 else ""
            raise DataError(
                f"{name}, row {row}: the target {value} is no label of binary cross entropy, which takes 0 and 1{signs}"
            )


def as_numbers(y: Tensor, classes: Sequence[str]) -> Tensor:
    """Targets (n,) that were numbered in order of their names, as the numbers that the names say.

    Raises:
        DataError: if a name is no number.
    """
    try:
        values = torch.tensor([float(name) for name in classes])
    except ValueError:
        raise DataError(
            f"the targets are classes ({', '.join(map(str, classes[:3]))}, ...), but this task predicts numbers; give "
            "numbers, or leave out task=..."
        ) from None
    return values[y]


def _check_whole(names: Sequence[str], parts: Sequence[Tensor]) -> None:
    for name, p in zip(names, parts, strict=True):
        if p.is_floating_point() and bool((bad := p != p.round()).any()):
            row = _first(bad)
            raise DataError(
                f"{name}, row {row}: target {_shown(p[row])} is a number to be predicted, not a class; {LOSS}"
            )


def _probabilities(names: Sequence[str], parts: list[Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Floats (n, C, ...) as they are if they are probabilities over dimension 1, which cross entropy takes."""
    for name, p in zip(names, parts, strict=True):
        sums = p.sum(1) if p.is_floating_point() else p.double().sum(1)
        wrong = (p < 0).flatten(1).any(1) | ((sums - 1).abs() > 1e-3).reshape(len(p), -1).any(1)
        if p.shape[1] < 2 or bool(wrong.any()):
            row = _first(wrong)
            raise DataError(
                f"{name}, row {row}: targets of shape {tuple(p.shape[1:])} are floats, and no class probabilities; "
                f"{LOSS}"
            )
    dtype = next(p.dtype for p in parts if p.is_floating_point())
    return [p if p.is_floating_point() else p.to(dtype) for p in parts], ()


def _check_sequences(names: Sequence[str], parts: Sequence[Tensor]) -> None:
    """Several class ids per sample: from 0, or -100 where they are to be ignored."""
    for name, p in zip(names, parts, strict=True):
        if not p.is_floating_point() and p.dtype != torch.bool and int(p.min()) < 0:
            if bool((bad := (p < 0) & (p != IGNORED)).any()):
                row = _first(bad)
                raise DataError(
                    f"{name}, row {row}: label {int(p[row][bad[row]][0])}; class ids start at 0, and -100 is ignored"
                )
            if bool((empty := (p == IGNORED).flatten(1).all(1)).any()):
                raise DataError(f"{name}, row {_first(empty)}: every label is -100 (ignore); drop that row")


def _first(bad: Tensor) -> int:
    """The first row with a mark."""
    return int(bad.reshape(len(bad), -1).any(1).nonzero()[0])


def _shown(value: Tensor) -> str:
    if value.dim():
        return "not finite"
    number = float(value)
    return f"{number:g}" if number == number else "NaN"
