"""Long-tailed data: training sets that follow an exponential profile, who is many, medium and few, and local tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch

from fedsim.data.common import SPLIT_SEED, select
from fedsim.data.dataset import Dataset
from fedsim.data.shards import Shards
from fedsim.errors import DataError

GROUPS = ("many", "medium", "few")
SHARES = (75, 95)  # percent of the samples that the classes of `many`, and of `many` and `medium`, hold


def profile(largest: int, num_classes: int, imbalance: float) -> np.ndarray:
    """Samples per class (C,) int64: ``floor(largest * f ** (c / (C - 1)))``, class 0 the largest (Cao et al. 2019).

    ``imbalance``: both conventions. Above 1 it is largest/smallest, and f its inverse; up to 1 it is f itself.
    """
    if not 0 < imbalance < float("inf"):
        raise DataError(f"data.imbalance={imbalance}: give largest/smallest (e.g. 100), or its inverse")
    if largest < 1:
        raise DataError(f"data.largest={largest}: give at least 1 sample")
    factor = 1 / imbalance if imbalance > 1 else imbalance
    steps = np.arange(num_classes) / max(num_classes - 1, 1)
    return np.floor(largest * factor**steps).astype(np.int64)


def long_tail(dataset: Dataset, imbalance: float, largest: int | None = None) -> Dataset:
    """Cut the training set down to ``profile``, classes in label order; the test set stays as it is.

    Which samples of a class stay follows from a fixed shuffle, so every run sees the same data. ``largest`` is the size
    of class 0, by default what every class has.

    Raises:
        DataError: if targets are no class labels, or a class has fewer samples than its place asks for.
    """
    classes, ids = dataset.num_classes, dataset.class_labels()
    if ids is None:
        raise DataError("data.imbalance: this data set has no class labels; leave it null")
    labels = ids.numpy()
    held = np.bincount(labels, minlength=classes)
    wanted = profile(int(held.min()) if largest is None else largest, classes, imbalance)
    short = np.flatnonzero(held < wanted)
    if len(short):
        c = int(short[0])
        raise DataError(
            f"data.largest={largest}: class {c} ({dataset.classes[c]}) should keep {wanted[c]} of {held[c]} samples; "
            f"give at most {int(held.min())}"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.cumsum(held) - held
    rows = np.concatenate([order[a : a + n] for a, n in zip(starts, wanted, strict=True)])
    return select(dataset, np.sort(rows))


def tailed(source: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """``source`` with two more options, ``imbalance`` and ``largest``: see ``long_tail``; ``None`` leaves it whole."""

    @wraps(source)
    def load(
        *args: Any, imbalance: float | None = None, largest: int | None = None, **options: Any
    ) -> Dataset:
        if imbalance is None and largest is not None:
            raise DataError(f"data.largest={largest}: is of a long tail; give data.imbalance too")
        found = source(*args, **options)
        return found if imbalance is None else long_tail(found, imbalance, largest)

    own = inspect.signature(source)
    more = [
        p
        for p in inspect.signature(load, follow_wrapped=False).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    load.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    return load


def class_groups(counts: np.ndarray) -> np.ndarray:
    """Group of each class (C,), an index into ``GROUPS``, from its number of training samples (C,).

    Classes by falling count, ties in label order: ``many`` is the shortest beginning that holds 75 % of the samples,
    ``medium`` goes on to 95 %, ``few`` is the rest; so is a class without samples.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    out = np.empty(len(counts), dtype=np.int64)
    out[order] = sum((100 * before >= share * counts.sum()).astype(np.int64) for share in SHARES)
    return out


def local_tests(
    counts: np.ndarray, labels: np.ndarray, rng_for_client: Callable[[int], np.random.Generator]
) -> Shards:
    """Each client's own part of the common test set, with the label mix of its training samples.

    Client i gets ``int(counts[i, c] / counts.sum() * n)`` of the n test samples of class c, or all there are; distinct
    within a client, while clients overlap. ``counts`` (m, C) are training samples, ``labels`` (n,) the test set's.
    """
    wanted = (counts / max(counts.sum(), 1) * len(labels)).astype(np.int64)
    pools = [np.flatnonzero(labels == c) for c in range(counts.shape[1])]
    parts = []
    for client, row in enumerate(wanted):
        rng = rng_for_client(client)
        chosen = [rng.permutation(pools[c])[: row[c]] for c in np.flatnonzero(row)]
        parts.append(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen])))
    return Shards.of(parts)


def by_class(sums: torch.Tensor, groups: np.ndarray) -> dict[str, float]:
    """Metrics from ``sums`` (3, C): per class, samples that were right, samples, and predictions.

    ``many``, ``medium`` and ``few`` accuracy: right samples over samples of the group, left out where it has none;
    ``macro_f1`` over classes that occur, ``weighted_f1`` by their samples.
    """
    right, held, predicted = sums.double().numpy()
    out = {}
    for g, name in enumerate(GROUPS):
        inside = groups == g
        if held[inside].sum():
            out[f"{name}/accuracy"] = float(right[inside].sum() / held[inside].sum())
    there = held > 0
    f1 = 2 * right[there] / (held[there] + predicted[there])
    out["macro_f1"] = float(f1.mean())
    out["weighted_f1"] = float((f1 * held[there]).sum() / held.sum())
    return out
