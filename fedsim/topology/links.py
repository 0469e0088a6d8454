"""Which messages are sent over the edges of a graph in a synchronous round, and which arrive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


def arrivals(
    graph: csr_array,
    online: Sequence[int],
    rng: np.random.Generator,
    *,
    fanout: int | None = None,
    direction: str = "push",
    loss: float = 0.0,
) -> tuple[csr_array, csr_array]:
    """Messages sent and messages that arrive, both (N, N) with ones at (receiver, sender).

    Peers outside ``online`` neither send nor receive. With ``fanout`` f each peer draws f of its neighbours online and
    sends to them (``push``), asks them (``pull``) or both (``push_pull``). ``loss``: probability per message.
    """
    n = graph.shape[0]
    on = np.zeros(n, dtype=bool)
    on[list(online)] = True
    receiver = np.repeat(np.arange(n), np.diff(graph.indptr))
    sender = graph.indices.astype(np.int64)
    live = on[receiver] & on[sender]
    receiver, sender = receiver[live], sender[live]
    if fanout is not None:
        chosen = _some(receiver if direction == "pull" else sender, fanout, rng)
        if direction == "push_pull":
            chosen |= np.isin(receiver * n + sender, (sender * n + receiver)[chosen])
        receiver, sender = receiver[chosen], sender[chosen]
    sent = _matrix(receiver, sender, n)
    if not loss:
        return sent, sent
    kept = rng.random(len(sender)) >= loss
    return sent, _matrix(receiver[kept], sender[kept], n)


def _some(owner: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark ``count`` entries of every owner at random (all, if it has fewer)."""
    order = np.lexsort((rng.random(len(owner)), owner))
    ranked = owner[order]
    rank = np.arange(len(owner)) - np.searchsorted(ranked, ranked, side="left")
    out = np.zeros(len(owner), dtype=bool)
    out[order] = rank < count
    return out


def _matrix(receiver: NDArray[np.int64], sender: NDArray[np.int64], n: int) -> csr_array:
    out = csr_array((np.ones(len(sender)), (receiver, sender)), shape=(n, n))
    out.sort_indices()
    return out
