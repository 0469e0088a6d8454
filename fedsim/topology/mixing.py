"""Mixing weights: what a peer gives its own model and each model that reached it. Every row sums to 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

SCHEMES = ("conservative", "uniform", "metropolis", "data_size")
Vector = NDArray[np.float64]


class Mixing(NamedTuple):
    """``own`` (k,) for the own models and ``others`` (k, S) for received ones."""

    own: Vector
    others: csr_array


def mixing(
    scheme: str,
    arrived: csr_array,
    *,
    own_weight: float = 0.5,
    receivers: NDArray[np.int64] | None = None,
    senders: NDArray[np.int64] | None = None,
    degrees: NDArray[np.int64] | None = None,
    sizes: NDArray[np.int64] | None = None,
) -> Mixing:
    """Weights of k receivers for S models, over what arrived: ``arrived`` (k, S) counts messages.

    ``conservative``: the own model ``own_weight``, the messages equal parts of the rest. ``uniform``: all the same.
    ``metropolis``: ``1 / (1 + max(d_i, d_j))`` for every sender heard (several messages of one share it), the own
    model the remainder; needs an undirected graph's ``degrees``. ``data_size``: in proportion to training samples.
    ``receivers`` (k,) and ``senders`` (S,) are the peers' numbers, by default 0, 1, 2, ...
    """
    k, s = arrived.shape
    i = np.arange(k) if receivers is None else receivers
    j = np.arange(s) if senders is None else senders
    weights = arrived.astype(np.float64)
    rows = np.repeat(np.arange(k), np.diff(arrived.indptr))
    messages = np.bincount(rows, arrived.data, k)
    if scheme == "conservative":
        own = np.where(messages > 0, own_weight, 1.0)
        weights.data *= ((1 - own) / np.maximum(messages, 1))[rows]
    elif scheme == "uniform":
        own = 1 / (messages + 1)
        weights.data *= own[rows]
    elif scheme == "metropolis":
        assert degrees is not None
        sender = j[arrived.indices]
        edge = 1 / (1.0 + np.maximum(degrees[i][rows], degrees[sender]))
        weights.data *= edge / _messages_of_sender(rows, sender, arrived.data)
        own = 1 - np.bincount(rows, weights.data, k)
    else:
        assert scheme == "data_size" and sizes is not None
        weights.data *= np.maximum(sizes[j[arrived.indices]], 1e-12)
        mine = np.maximum(sizes[i].astype(np.float64), 1e-12)
        total = mine + np.bincount(rows, weights.data, k)
        own = mine / total
        weights.data /= total[rows]
    return Mixing(own, weights)


def _messages_of_sender(rows: NDArray[np.int64], sender: NDArray[np.int64], counts: Vector) -> Vector:
    """For every entry: how many messages its row has from that entry's sender."""
    pairs = np.stack([rows, sender])
    _, group = np.unique(pairs, axis=1, return_inverse=True)
    group = group.reshape(-1)
    return np.bincount(group, counts).astype(np.float64)[group] if len(group) else counts
