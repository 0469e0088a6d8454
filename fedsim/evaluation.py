"""Measuring a model: sums per batch, so that the result does not depend on how batches are spread over workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.data.local import LocalData
from fedsim.task import Task
from fedsim.vectors import FlatModel


def evaluate(
    model: FlatModel, w: Tensor, data: LocalData, task: Task, rows: Iterable[Tensor]
) -> list[dict[str, float]]:
    """Sums of loss and metrics at ``w`` (d,) for each batch of row positions, in evaluation mode, without gradients."""
    model.bind(w)
    model.module.eval()
    try:
        with torch.inference_mode():
            out = []
            for part in rows:
                x, y = data.read(part)
                out.append({"samples": float(len(y)), **task.measure(model.module(x), y)})
            return out
    finally:
        model.module.train()
        model.bind(model.w)


def mean_of(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over all samples from per-batch sums, added in the order given."""
    total: dict[str, float] = {}
    for part in sums:
        for k, v in part.items():
            total[k] = total.get(k, 0.0) + v
    n = total.pop("samples", 0.0)
    return {k: v / n for k, v in total.items()} if n else {}


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
