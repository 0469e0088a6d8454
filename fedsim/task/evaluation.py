"""Measuring a model: sums per batch, so that the result does not depend on how batches are spread over workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import by_class
from fedsim.data.trees import tree_map
from fedsim.models.split import features_of
from fedsim.task.metrics import added, values
from fedsim.task.problems import logits_of
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


def evaluate(
    model: FlatModel, w: Tensor, data: LocalData, task: Task, rows: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """Sums of loss and metrics at ``w`` (d,) for each batch of row positions, in evaluation mode, without gradients."""
    out = []
    with model.measuring(w) as again:
        for batch in map(data.read, rows):
            again()
            out.append(task.measured(model.module, batch))
    return out


def sample_losses(model: FlatModel, w: Tensor, data: LocalData, task: Task, batch_size: int = 512) -> Tensor:
    """Loss (n,) of every sample of ``data`` at ``w`` (d,), in evaluation mode, without gradients; float64."""

    def one(output: Any, y: Tensor) -> Tensor:
        return task.loss(*(tree_map(lambda t: t[None], tree) for tree in (output, y)))

    out = []
    with model.measuring(w) as again:
        for rows in torch.split(torch.arange(len(data)), batch_size):
            again()
            x, y = data.read(rows)
            out.append(torch.vmap(one)(task.output(model.module, x), y).double().cpu())
    return torch.cat(out)


def measured(task: Task, output: Any, y: Tensor) -> dict[str, Any]:
    """Sums of loss and metrics over one batch of outputs, and its ``samples``."""
    return {"samples": float(len(y)), **task.measure(output, y)}


def features(model: FlatModel, w: Tensor, batches: Iterable[Batch]) -> list[Tensor]:
    """Features (B, d) of each batch at ``w`` (d,), in evaluation mode, without gradients."""
    out = []
    with model.measuring(w) as again:
        for x, _ in batches:
            again()
            out.append(features_of(model.module, x))
    return out


def logits(model: FlatModel, w: Tensor, batches: Iterable[Batch], task: Task) -> list[Tensor]:
    """Logits (B, C) of each batch at ``w`` (d,), in evaluation mode, without gradients."""
    out = []
    with model.measuring(w) as again:
        for x, _ in batches:
            again()
            out.append(logits_of(task.output(model.module, x)).cpu())
    return out


def mean_of(
    sums: Sequence[dict[str, Any]], groups: np.ndarray | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Means over all samples from per-batch sums (see ``measured``), added in the order given.

    Counts by class become the metrics of ``fedsim.data.longtail.by_class`` under ``groups`` (C,), if given; states of
    torchmetrics objects of ``task`` become their values.
    """
    total = added(sums)
    n, counts = total.pop("samples", 0.0), total.pop("by_class", None)
    total.pop("taken_for", None)
    if not n:
        return {}
    metrics = (task.metrics if task is not None else None) or {}
    out: dict[str, Any] = {}
    for name, found in total.items():
        out |= values(name, metrics.get(name), found, n)
    for name, make in ((task.derived if task is not None else None) or {}).items():
        out[name] = make(out)
    return out | by_class(counts, groups) if counts is not None and groups is not None else out


def class_accuracy(sums: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """``class_accuracy`` (C,) from per-batch sums with counts by class; NaN where there are no samples."""
    right, held, _ = torch.stack([part["by_class"] for part in sums]).sum(dim=0).double()
    return {"class_accuracy": (right / held).tolist()}


def over_domains(each: Mapping[str, Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """Metrics by domain as flat numbers: ``domain/<name>/accuracy`` of each, ``domains/accuracy`` their unweighted mean
    and ``domains/accuracy_std`` the population standard deviation over domains; ``prefix`` comes before each name."""
    out = {f"{prefix}domain/{name}/{k}": v for name, found in each.items() for k, v in found.items()}
    for k in next(iter(each.values()), {}):
        numbers = [found[k] for found in each.values() if k in found and isinstance(found[k], float)]
        if not numbers:
            continue
        mean = sum(numbers) / len(numbers)
        out[f"{prefix}domains/{k}"] = mean
        out[f"{prefix}domains/{k}_std"] = math.sqrt(sum((v - mean) ** 2 for v in numbers) / len(numbers))
    return out
