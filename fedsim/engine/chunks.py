"""How a cohort is cut into chunks: the unit of scheduling, of vectorising and of summation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

FEW, MANY, CLIENTS_PER_CHUNK = 10, 64, 16  # chunks of a small model: one per 16 clients within these bounds
LARGE_MODEL, LARGE_MODEL_CHUNKS = 2_000_000, 4
SMALLEST = 0.1  # share of the first chunk's work that the last one has

Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """Chunks that are put together when they are asked for, each time anew: only then are client states fetched.

    An engine that asks for chunks as it sends them has no more states in memory than are under way.
    """

    def __init__(self, makers: Sequence[Callable[[], Item]]):
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        return self._makers[index]()


def cut(work: Sequence[float], wish: int, size: int) -> list[slice]:
    """Cut a cohort with per-client ``work`` into runs of about equal work, towards the end of less and less.

    Workers take the largest first, so the small ones fill what is left at the end of a round. Borders come from the
    cohort and the configuration only, never from the number of workers: sums within a chunk and over chunks then have
    one order, and results the same bits. ``wish=0`` means one chunk per 16 clients, but at least 10 and at most 64;
    where the model's ``size`` is 2 million parameters or more 4 alike, since each chunk costs a copy of the vector.
    """
    n = len(work)
    small = min(max(n // CLIENTS_PER_CHUNK, FEW), MANY)
    count = min(n, wish or (LARGE_MODEL_CHUNKS if size >= LARGE_MODEL else small))
    if count == 0:
        return []
    done = np.cumsum(np.maximum(np.asarray(work, dtype=np.float64), 1e-9))
    taper = 1 - SMALLEST if count > LARGE_MODEL_CHUNKS else 0.0
    share = 1 - taper * np.linspace(0, 1, count) ** 2
    ideal = done[-1] * np.cumsum(share)[:-1] / share.sum()
    borders = np.searchsorted(done, ideal, side="left") + 1
    low = np.arange(1, count)  # every chunk keeps at least one client
    borders = np.minimum(np.maximum.accumulate(np.maximum(borders, low) - low) + low, n - count + low)
    edges = [0, *borders.tolist(), n]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
