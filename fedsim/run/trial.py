"""The model tried on two samples before anything starts: does it take the inputs, and tell all classes apart?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.local import prepare
from fedsim.errors import ConfigError
from fedsim.task.copies import copied
from fedsim.task.fixed import converted
from fedsim.task.task import LossFn, cross_entropy


def output(model: nn.Module, x: Tensor, dtype: torch.dtype, normalize: Normalize | None = None) -> Any:
    """What a copy of ``model`` makes of the first two of the stored samples ``x``, in evaluation mode."""
    tried = converted(copied(model), dtype, "cpu").eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return tried(prepare(x[:2], dtype, normalize))


def outputs(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int | None:
    """How many classes ``model`` tells apart: K, where it gives (B, K, ...); ``None`` if that cannot be told."""
    for kind in (x.dtype, torch.int64, torch.float32):
        try:
            found = output(model, x[:2].to(kind), dtype)
        except Exception:  # any of the user's: what is wrong with the model is said by ``check``
            continue
        return found.shape[1] if isinstance(found, Tensor) and found.dim() > 1 else None
    return None


def as_taken(data: Dataset, model: nn.Module, dtype: torch.dtype) -> Dataset:
    """``data`` with inputs that ``model`` takes: integers as they are, else as int64 (to look up), else as numbers."""
    x = data.train.x
    if x.is_floating_point() or data.normalize is not None or not len(x):
        return data
    for kind in dict.fromkeys((x.dtype, torch.int64, dtype)):
        try:
            output(model, x[:2].to(kind), dtype)
        except Exception:  # any of the user's
            continue
        return data if kind == x.dtype else _in(data, kind)
    return data


def _in(data: Dataset, kind: torch.dtype) -> Dataset:
    test = None if data.test is None else Samples(data.test.x.to(kind), data.test.y)
    return replace(data, train=Samples(data.train.x.to(kind), data.train.y), test=test)


def check(data: FederatedData, model: nn.Module, loss: LossFn, dtype: torch.dtype) -> None:
    """Refuse a model that cannot compute two samples, or has fewer outputs than cross entropy needs for the classes.

    Raises:
        ConfigError: one line; for a label without an output it names client, row and label.
    """
    train = data.dataset.train
    if not len(train):
        return
    name = type(model).__name__
    try:
        found = output(model, train.x, dtype, data.dataset.normalize)
    except Exception as error:  # any of the user's
        kind = str(train.x.dtype).removeprefix("torch.")
        said = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"model: {name} cannot compute two samples of shape {tuple(train.x.shape[1:])} ({kind}): "
            f"{type(error).__name__}: {said[-1]}"
        ) from error
    if loss is cross_entropy:
        _check_labels(data, found, name)


def _check_labels(data: FederatedData, found: Any, name: str) -> None:
    y = data.dataset.train.y
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"model: {name} gives a {type(found).__name__}; cross entropy needs logits (B, C). Give loss=..., or a "
            "model that returns them"
        )
    if not y.is_floating_point() and found.dim() == y.dim() + 1:
        _check_classes(data, found.shape[1], name)
    try:
        with torch.no_grad():
            cross_entropy(found, y[:2].to(found.dtype) if y.is_floating_point() else y[:2])
    except Exception as error:  # torch raises several types
        one_hot = " (one-hot rows? Hand over y.argmax(1))" if y.dim() == 2 else ""
        raise ConfigError(
            f"model: {name} gives {tuple(found.shape)} for two samples, which does not fit targets of shape "
            f"{tuple(y[:2].shape)} under cross entropy{one_hot}; change the model or give loss=..."
        ) from error


def _check_classes(data: FederatedData, outputs: int, name: str) -> None:
    """Every label needs an output: the first that has none is named."""
    dataset = data.dataset
    for which, part in (("", dataset.train), ("the test set", dataset.test)):
        if part is None or not len(part) or int(part.y.max()) < outputs:
            continue
        row = int((part.y >= outputs).reshape(len(part), -1).any(1).nonzero()[0])
        label = int(part.y[row].max())
        whose = f"{which}, row {row}," if which else f"{data.shards.whose(row)},"
        called = dataset.classes[label] if label < len(dataset.classes) else str(label)
        more = "" if called == str(label) else f" ({called!r})"
        raise ConfigError(
            f"model: {name} has {outputs} outputs, but {whose} has the label {label}{more}; give the model "
            f"{max(label + 1, dataset.num_classes)} outputs, or number the classes from 0"
        )
