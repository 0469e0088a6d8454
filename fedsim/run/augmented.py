"""An augmentation that was handed over, tried on a few samples before anything starts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.local import Batch, prepare
from fedsim.data.trees import in_dtype, named_leaves, tree_map
from fedsim.data.views.base import Joint, View, count, seen, seen_prepared
from fedsim.errors import ConfigError, DataError
from fedsim.rng import undisturbed
from fedsim.run.trial import tried
from fedsim.task.task import Task

ROWS = 8  # samples that it is shown
BYTES = 16  # a picture of bytes whose brightest pixel is below it tells nothing about its scale


def check_augment(
    augment: Any,
    data: Dataset,
    key: str = "augment",
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse an ``augment``, handed over or of the setting ``key``, that cannot show samples of ``data``, or shows what
    cannot be trained on: every client would fail by it.

    Another shape or type is no fault by itself: crops of any size fit many models, mixed labels many losses. It is
    refused where the loss of ``task``, if given, cannot be computed of it.

    Raises:
        ConfigError: one line, with what went wrong, what it got and what it gave.
    """
    if isinstance(augment, type) or not callable(augment):
        given = augment.__name__ if isinstance(augment, type) else repr(augment)
        raise ConfigError(
            f"{key}={given}: expected a function (x, generator) -> x of a batch; views by name are settings, "
            "as in data.augment"
        )
    if not len(data.train):
        return
    x, y = data.train.take(torch.arange(min(ROWS, len(data.train))))
    name = getattr(augment, "__qualname__", type(augment).__name__)
    try:
        with undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shown, targets = seen(augment, x, y, torch.Generator().manual_seed(0))
    except ConfigError:
        raise
    except DataError as error:  # one of ours
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:  # any of the user's
        raise ConfigError(
            f"{key}: {name} cannot show a batch of shape {_kinds(x)}: {_said(error)}. It is called as "
            "(x, generator) -> x"
        ) from error
    _check_numbers(key, name, x, shown)
    if (
        task is not None
        and data.train.sliceable
        and (_kinds(x), _kinds(y)) != (_kinds(shown), _kinds(targets))
    ):
        batch = Batch(prepare(shown, dtype, data.normalize), in_dtype(targets, dtype))
        _check_change(key, name, task, batch, dtype, Batch(x, y), Batch(shown, targets))


def check_view(view: View, data: Dataset, key: str, task: Task, dtype: torch.dtype) -> None:
    """The same of a view of the user's, which is shown what a model is given.

    Raises:
        ConfigError: one line, with what went wrong, what it got and what it gave.
    """
    stored, y = data.train.take(torch.arange(min(ROWS, len(data.train))))
    given = Batch(prepare(stored, dtype, data.normalize), in_dtype(y, dtype))
    thing = view.function if isinstance(view, Joint) else view
    name = getattr(thing, "__qualname__", type(thing).__name__)
    try:
        with undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copies = tree_map(lambda t: t.clone(), given.x), tree_map(lambda t: t.clone(), given.y)
            found = seen_prepared(view, *copies, torch.Generator().manual_seed(0), data.normalize, stored)
    except ConfigError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('augment or view: ')}") from error
    except Exception as error:  # any of the user's
        raise ConfigError(
            f"{key}: {name} cannot show a batch of shape {_kinds(given.x)}: {_said(error)}. It is called as "
            "(x, generator) -> x, or (x, y, generator) -> (x, y)"
        ) from error
    shown = Batch(*found)
    _check_numbers(key, name, given.x, shown.x)
    for what, before, after in zip(("samples", "targets"), map(count, given), map(count, shown), strict=True):
        if before != after:
            raise ConfigError(f"{key}: {name} returned {after} {what}, expected {before}, as it was given")
    if data.train.sliceable and (_kinds(given.x), _kinds(given.y)) != (_kinds(shown.x), _kinds(shown.y)):
        _check_change(key, name, task, shown, dtype, given, shown)


def _check_numbers(key: str, name: str, x: Any, shown: Any) -> None:
    """Refuse what is no plain tensor, no number any more, or bytes in another scale than the samples measured on."""
    before = dict(named_leaves(x))
    for leaf, t in named_leaves(shown):
        what = f"{key}: {name} returned {leaf and leaf + ' as '}"
        old = before.get(leaf)
        if not isinstance(t, Tensor):
            if isinstance(old, Tensor):
                raise ConfigError(f"{what}{type(t).__name__}, expected a tensor of {_kinds(old)}")
            continue
        if t.layout != torch.strided:
            raise ConfigError(f"{what}a sparse tensor; return a dense one (.to_dense())")
        if not isinstance(old, Tensor) or not t.is_floating_point():
            continue
        if bool(torch.isfinite(old).all()) and not bool(torch.isfinite(t).all()):
            raise ConfigError(
                f"{what}NaN or infinity for finite samples; look for 0 / 0, and logarithms of 0"
            )
        if (
            old.dtype == torch.uint8
            and int(old.max()) >= BYTES
            and float(t.abs().max()) <= int(old.max()) / BYTES
        ):
            raise ConfigError(
                f"{what}numbers up to {float(t.abs().max()):.3g} for bytes up to {int(old.max())}: samples are "
                "scaled after it, as those that the model is measured on; keep them in 0..255"
            )


def _check_change(
    key: str, name: str, task: Task, batch: Batch, dtype: torch.dtype, given: Batch, shown: Batch
) -> None:
    """Refuse a batch of another shape or type, of which the loss cannot be computed."""
    try:
        with tried(task.model, dtype) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task.value(model, batch)
    except Exception as error:  # any of the user's
        part = "x" if _kinds(given.x) != _kinds(shown.x) else "y"
        expected, got = (_kinds(getattr(b, part)) for b in (given, shown))
        raise ConfigError(
            f"{key}: {name} returned {part} as {got}, expected {expected}, as it was given: "
            f"{type(task.model).__name__} and its loss end in {_said(error)}"
        ) from error


def _kinds(tree: Any) -> str:
    """Shape and type of every leaf, without the first dimension's number: ``(B, 1, 8, 8) float32``."""
    return ", ".join(f"{key and key + ' '}{_kind(leaf)}" for key, leaf in named_leaves(tree)) or "nothing"


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    shape = ", ".join(["B", *map(str, leaf.shape[1:])])
    return f"({shape}) {str(leaf.dtype).removeprefix('torch.')}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
