"""Measuring a model: sums per batch, so that the result does not depend on how batches are spread over workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import by_class
from fedsim.models.split import features_of
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


def evaluate(
    model: FlatModel, w: Tensor, data: LocalData, task: Task, rows: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """Sums of loss and metrics at ``w`` (d,) for each batch of row positions, in evaluation mode, without gradients."""
    out = []
    with model.measuring(w) as again:
        for x, y in map(data.read, rows):
            again()
            out.append(measured(task, model.module(x), y))
    return out


def sample_losses(model: FlatModel, w: Tensor, data: LocalData, task: Task, batch_size: int = 512) -> Tensor:
    """Loss (n,) of every sample of ``data`` at ``w`` (d,), in evaluation mode, without gradients; float64."""

    def one(output: Any, y: Tensor) -> Tensor:
        return task.loss(tree_map(lambda t: t[None], output), y[None])

    out = []
    with model.measuring(w) as again:
        for rows in torch.split(torch.arange(len(data)), batch_size):
            again()
            x, y = data.read(rows)
            out.append(torch.vmap(one)(model.module(x), y).double().cpu())
    return torch.cat(out)


def measured(task: Task, output: Any, y: Tensor) -> dict[str, Any]:
    """Sums of loss and metrics over one batch, and its ``samples``."""
    return {"samples": float(len(y)), **task.measure(output, y)}


def features(model: FlatModel, w: Tensor, batches: Iterable[Batch]) -> list[Tensor]:
    """Features (B, d) of each batch at ``w`` (d,), in evaluation mode, without gradients."""
    out = []
    with model.measuring(w) as again:
        for x, _ in batches:
            again()
            out.append(features_of(model.module, x))
    return out


def mean_of(sums: Sequence[dict[str, Any]], groups: np.ndarray | None = None) -> dict[str, float]:
    """Means over all samples from per-batch sums (see ``measured``), added in the order given.

    Counts by class become the metrics of ``fedsim.data.longtail.by_class`` under ``groups`` (C,), if given.
    """
    total: dict[str, Any] = {}
    for part in sums:
        for k, v in part.items():
            total[k] = total.get(k, 0.0) + v
    n, counts = total.pop("samples", 0.0), total.pop("by_class", None)
    if not n:
        return {}
    out: dict[str, float] = {k: v / n for k, v in total.items()}
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
        values = [found[k] for found in each.values() if k in found]
        mean = sum(values) / len(values)
        out[f"{prefix}domains/{k}"] = mean
        out[f"{prefix}domains/{k}_std"] = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return out
