"""What partitions share: checks, whole numbers from shares, and dealing samples out by counts."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from fedsim.errors import DataError

Parts = list[np.ndarray]

REDRAWS = 10  # draws of a random split before `min_samples` is enforced by moving samples


def dirichlet_counts(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float, per_class: int
) -> Callable[[], np.ndarray]:
    """A draw of ``counts (m, C)``: ``per_class`` each (of classes that exist), the rest by Dirichlet shares."""
    totals = np.bincount(labels, minlength=int(labels.max()) + 1 if len(labels) else 0)
    fixed = np.where(totals > 0, per_class, 0)
    if (fixed * num_clients > totals).any():
        label = int(np.flatnonzero(fixed * num_clients > totals)[0])
        raise DataError(
            f"partition.per_class={per_class} for {num_clients} clients: class {label} has {totals[label]} samples"
        )

    def draw() -> np.ndarray:
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(totals))
        left = totals - fixed * num_clients
        dealt = [apportion(share, total) for share, total in zip(shares, left, strict=True)]
        return np.stack(dealt, axis=1) + fixed

    return draw


def check(labels: np.ndarray, num_clients: int, min_samples: int = 0) -> int:
    """Validate what a partition by label is given; returns the number of classes."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        if labels.ndim == 2 and not labels.shape[1]:
            raise DataError("there are no targets to split by; type partition=iid, quantity or natural")
        raise DataError(
            f"labels must be integers (N,) from 0, got {labels.dtype} of shape {labels.shape}: such targets cannot be "
            "split by label; type partition=iid, quantity or natural"
        )
    check_count(labels, num_clients, min_samples)
    return int(labels.max()) + 1 if len(labels) else 0


def check_count(labels: np.ndarray, num_clients: int, min_samples: int = 0) -> None:
    """Validate what every partition is given; targets (N, ...) may be anything."""
    if num_clients < 1:
        raise DataError(f"num_clients={num_clients}: give at least 1")
    if num_clients * min_samples > len(labels):
        raise DataError(
            f"partition.min_samples={min_samples}, {num_clients} clients: needs {num_clients * min_samples} "
            f"samples, there are {len(labels)}; give at most {len(labels) // num_clients}, or fewer clients"
        )


def positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite, naming its key."""
    if not 0 < value < float("inf"):
        raise DataError(f"partition.{name}={value}: give a positive number")


def parts_of(samples: np.ndarray, owner: np.ndarray, num_clients: int) -> Parts:
    """Cut ``samples`` by ``owner`` (both ``(n,)``) into one sorted array per client."""
    ordered = samples[np.lexsort((samples, owner))].astype(np.int64, copy=False)
    ends = np.cumsum(np.bincount(owner, minlength=num_clients)).tolist()
    return [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``shares`` (they sum to 1) with sum ``total``, by rounding cumulated
    shares down."""
    cuts = np.floor(np.cumsum(shares)[:-1] * total).astype(np.int64).clip(0, total)
    return np.diff(cuts, prepend=0, append=total)


def with_minimum(draw: Callable[[], np.ndarray], minimum: int) -> np.ndarray:
    """``draw() -> counts (m, C)`` until each row sums to ``minimum``; after ``REDRAWS`` the last draw is
    repaired."""
    for _ in range(REDRAWS):
        counts = draw()
        if counts.sum(axis=1).min() >= minimum:
            return counts
    sizes = counts.sum(axis=1)
    donors = [(-size, client) for client, size in enumerate(sizes.tolist()) if size > minimum]
    heapq.heapify(donors)
    for client in np.flatnonzero(sizes < minimum):
        for _ in range(int(minimum - sizes[client])):
            size, donor = heapq.heappop(donors)
            label = int(counts[donor].argmax())
            counts[donor, label] -= 1
            counts[client, label] += 1
            if -size - 1 > minimum:
                heapq.heappush(donors, (size + 1, donor))
    return counts


def assign(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Parts:
    """Give client i ``counts[i, c]`` random samples of class c, each sample once."""
    clients = np.arange(len(counts))
    owner = np.empty(len(labels), dtype=np.int64)
    for label in range(counts.shape[1]):
        owner[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(clients, counts[:, label])
    return parts_of(np.arange(len(labels)), owner, len(counts))
