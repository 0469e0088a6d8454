"""The model tried on two samples before anything starts: does it take the inputs, and tell all classes apart?"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data.dataset import Dataset, Normalize, Samples, SamplesLike, taken
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch, prepare
from fedsim.data.local import copied as copied_batch
from fedsim.data.trees import Tree, named_leaves, tree_map
from fedsim.errors import ConfigError
from fedsim.run.meeting import check_meeting
from fedsim.task.copies import copied
from fedsim.task.fixed import converted
from fedsim.task.losses import WholeLoss, admitted_loss, call, cross_entropy
from fedsim.task.merging import check_merging
from fedsim.task.metrics import Counted, State, values
from fedsim.task.problems import Problem, logits_of
from fedsim.task.task import Task, target

log = logging.getLogger(__name__)


def output(module: nn.Module, x: Tree, dtype: torch.dtype, normalize: Normalize | None = None) -> Any:
    """What a copy of ``module`` makes of the first two of the stored samples ``x``, in evaluation mode."""
    first = tree_map(lambda t: taken(t, torch.arange(min(2, len(t)))), x)
    with tried(module, dtype) as model:
        return call(model, prepare(first, dtype, normalize))


@contextmanager
def tried(module: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A copy of ``module`` in evaluation mode; what is drawn is drawn by nobody else's generator."""
    model = converted(copied(module), dtype, "cpu").eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield model


def outputs(model: nn.Module, x: Tree, dtype: torch.dtype) -> int | None:
    """How many classes ``model`` tells apart: K, where it gives (B, K, ...); ``None`` if that cannot be told."""
    kinds = dict.fromkeys((x.dtype, torch.int64, torch.float32) if isinstance(x, Tensor) else (None,))
    for kind in kinds:
        try:
            found = output(model, x[:2].to(kind) if isinstance(x, Tensor) else x, dtype)
        except Exception:  # any of the user's: what is wrong with the model is said by ``check``
            continue
        found = logits_of(found)
        return found.shape[1] if isinstance(found, Tensor) and found.dim() > 1 else None
    return None


def as_taken(data: Dataset, model: nn.Module, dtype: torch.dtype) -> Dataset:
    """``data`` with inputs that ``model`` takes: integers as they are, else as int64 (to look up), else as numbers."""
    x = data.train.x if isinstance(data.train, Samples) else None
    if not isinstance(x, Tensor) or x.is_floating_point() or data.normalize is not None or not len(x):
        return data
    for kind in dict.fromkeys((x.dtype, torch.int64, dtype)):
        try:
            output(model, x[:2].to(kind), dtype)
        except Exception:  # any of the user's
            continue
        return data if kind == x.dtype else _in(data, kind)
    return data


def _in(data: Dataset, kind: torch.dtype) -> Dataset:
    def changed(part: SamplesLike | None) -> Any:
        return Samples(part.x.to(kind), part.y) if isinstance(part, Samples) else part

    return replace(data, train=changed(data.train), test=changed(data.test))


def check(data: FederatedData, model: nn.Module, problem: Problem, batch: Batch, dtype: torch.dtype) -> Any:
    """Refuse a model that cannot compute two samples, ``batch``; returns its output, ``None`` where the loss calls it.

    Raises:
        ConfigError: one line, naming the model.
    """
    name = type(model).__name__
    if problem.forward is not None and (isinstance(problem.forward, type) or not callable(problem.forward)):
        raise ConfigError(
            f"forward: is a {type(problem.forward).__name__}; expected a function (model, x) -> output"
        )
    if problem.loss is not None and isinstance(admitted_loss(problem.loss), WholeLoss):
        return None
    try:
        with tried(model, dtype) as one:
            return (problem.forward or call)(one, copied_batch(batch).x)
    except Exception as error:  # any of the user's
        shown = ", ".join(f"{key + ' ' if key else ''}{_shape(t)}" for key, t in named_leaves(batch.x))
        said = str(error).strip().splitlines() or [""]
        named = isinstance(batch.x, Mapping) and "keyword argument" in said[-1]
        way = (
            ". A dict is passed by keyword: hand over the array alone, or forward=lambda model, x: ..."
            if named
            else ""
        )
        if isinstance(batch.x, tuple | list) and "positional argument" in said[-1]:
            way = ". Entries of a tuple are arguments; a sample (x, y) has targets, one of more entries is inputs alone"
        way = _narrow(model, dtype) if "dtype" in said[-1] else way
        whose = f"model: {name}" if problem.forward is None else f"forward: {_called(problem.forward)}"
        raise ConfigError(
            f"{whose} cannot compute two samples of shape {shown}: {type(error).__name__}: {said[-1]}{way}"
        ) from error


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _narrow(model: nn.Module, dtype: torch.dtype) -> str:
    """What to say of parameters that are trained in a wider type than theirs; empty if there are none."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point() and p.dtype.itemsize < dtype.itemsize:
            narrow, wide = (str(d).removeprefix("torch.") for d in (p.dtype, dtype))
            return (
                f". {name!r} is {narrow}, but is trained in {wide}: turn inputs into the type of the weight in the "
                f"forward pass (x.to(weight.dtype)), or hand over model.float() with client.autocast=bfloat16"
            )
    return ""


def check_measures(task: Task, batch: Batch, dtype: torch.dtype) -> None:
    """Refuse a loss or metrics that cannot take what the model gives for ``batch``.

    Raises:
        ConfigError: one line, with what went wrong.
    """
    if isinstance(task.loss, type) or not callable(task.loss):
        made = (
            f"hand over an object, {task.loss.__name__}()"
            if isinstance(task.loss, type)
            else "type task.loss=mse"
        )
        kind = "a class" if isinstance(task.loss, type) else f"a {type(task.loss).__name__}"
        raise ConfigError(f"loss: is {kind}; expected a function (output, y) -> tensor; {made}")
    plain = task.loss is cross_entropy and task.metrics is None and task.forward is None
    if (plain and isinstance(target(batch), Tensor | None)) or not batch.size:
        return
    try:
        with tried(task.model, dtype) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counted = {k: m for k, m in (task.metrics or {}).items() if isinstance(m, Counted)}
            _check_loss(task.value(model, copied_batch(batch)))
            first = task.measured(model, copied_batch(batch))
            again = task.measured(model, copied_batch(batch))
            for name in task.metrics or {}:
                _check_repeated(name, first.get(name), again.get(name))
            shown = None
            if counted or type(task.loss) is not WholeLoss:  # which alone knows how the model is called
                given = task.output(model, copied_batch(batch).x)
                shown = logits_of(given)
                own = {"loss": task.loss, **{f"metrics: {k!r}": m for k, m in (task.metrics or {}).items()}}
                check_meeting({k: f for k, f in own.items() if not isinstance(f, Counted)}, given, batch)
            for name, metric in counted.items():
                check_merging(name, metric, shown, target(batch))
    except ConfigError:
        raise
    except Exception as error:  # any of the user's
        said = str(error).strip().splitlines() or [""]
        what = "loss or metrics" if task.metrics else "loss"
        way = "Both are called as (output, y)"
        if task.loss is cross_entropy:
            way = (
                "No loss was given, so it is cross entropy, of logits and one array of targets; give loss=..."
            )
        raise ConfigError(
            f"task: the {what} cannot be computed for two samples of {type(task.model).__name__}: "
            f"{type(error).__name__}: {said[-1]}. {way}"
        ) from error


def _check_loss(found: Any) -> None:
    """Refuse what is no loss of a batch."""
    if isinstance(found, Tensor):
        if found.numel() != 1:
            raise ConfigError(
                f"loss: gave shape {tuple(found.shape)} for two samples; return one number, their mean()"
            )
        return
    if isinstance(found, float | int | np.ndarray | np.generic):
        raise ConfigError(
            f"loss: gave {type(found).__name__}, which has no gradient; return a tensor, without float()"
        )
    forgotten = "; is there a return at its end?" if found is None else ""
    raise ConfigError(
        f"loss: gave {type(found).__name__}; return one tensor, the mean over the batch{forgotten}"
    )


def _check_repeated(name: str, first: Any, again: Any) -> None:
    """Refuse a metric that gives another number for the same samples."""
    a, b = (
        f if f is None or isinstance(f, State) else values(name, None, f, 1.0)[name] for f in (first, again)
    )
    if isinstance(a, float) and isinstance(b, float) and not math.isclose(a, b, rel_tol=1e-6) and a == a:
        raise ConfigError(
            f"metrics: {name!r} gives {a:.6g}, then {b:.6g} for the same output and targets, since it keeps something "
            "(a counter, a list, a generator): workers would each have their own; give a torchmetrics object, or a "
            "function of output and targets alone"
        )


def check_labels(data: FederatedData, found: Any, name: str, batch: Batch) -> None:
    """Refuse an output that cross entropy cannot compare with the targets, or with too few entries for the classes.

    Raises:
        ConfigError: one line; for a label without an output it names client, row and label.
    """
    found, y = logits_of(found), data.dataset.train.labels
    if y is None:
        there = data.dataset.train.y if isinstance(data.dataset.train, Samples) else target(batch)
        if there is not None:
            return  # trees, or of a collate function: tried in ``check_measures``
        more = ""
        if isinstance(batch.x, tuple | list) and len(batch.x) > 2:
            more = f": a sample of {len(batch.x)} entries is inputs alone, return ((a, ...), y)"
        raise ConfigError(
            f"data: there are no targets, and the model works out no loss by itself; give loss=..., or targets{more}"
        )
    _check_labels(data, found, y, name)


def _shape(t: Any) -> str:
    if not isinstance(t, Tensor):
        return f"({type(t).__name__})"
    return f"{tuple(t.shape[1:])} ({str(t.dtype).removeprefix('torch.')})"


def _check_labels(data: FederatedData, found: Any, y: Tensor, name: str) -> None:
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"model: {name} gives a {type(found).__name__}; cross entropy needs logits (B, C). Give loss=..., or a "
            "model that returns them"
        )
    if not y.is_floating_point() and found.dim() == y.dim() + 1:
        _check_classes(data, found.shape[1], name)
        if found.shape[1] == 1 and len(y):
            raise ConfigError(
                f"model: {name} has one output and all labels are 0: their cross entropy is 0 whatever it gives, so "
                "nothing would be learned; there must be two classes or more, or loss=..."
            )
    try:
        with torch.no_grad():
            cross_entropy(found, y[:2].to(found.dtype) if y.is_floating_point() else y[:2])
    except Exception as error:  # torch raises several types
        one_hot = " (one-hot rows? Hand over y.argmax(1))" if y.dim() == 2 else ""
        if not y.is_floating_point() and found.dim() == 3 and found.shape[:2] == y[:2].shape:
            one_hot = " (a class for each token? Type task=language_model task.shift=false)"
        raise ConfigError(
            f"model: {name} gives {tuple(found.shape)} for two samples, which does not fit targets of shape "
            f"{tuple(y[:2].shape)} under cross entropy{one_hot}; change the model or give loss=..."
        ) from error


def _check_classes(data: FederatedData, outputs: int, name: str) -> None:
    """Every label needs an output: the first that has none is named."""
    dataset = data.dataset
    for which, part in (("", dataset.train), ("the test set", dataset.test)):
        y = None if part is None else part.labels
        if y is None or not len(y) or int(y.max()) < outputs:
            continue
        row = int((y >= outputs).reshape(len(y), -1).any(1).nonzero()[0])
        label = int(y[row].max())
        whose = f"{which}, row {row}," if which else f"{data.shards.whose(row)},"
        called = dataset.classes[label] if label < len(dataset.classes) else str(label)
        more = "" if called == str(label) else f" ({called!r})"
        raise ConfigError(
            f"model: {name} has {outputs} outputs, but {whose} has the label {label}{more}; give the model "
            f"{max(label + 1, dataset.num_classes)} outputs, or number the classes from 0"
        )
