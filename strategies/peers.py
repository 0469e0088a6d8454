"""What strategies for peers share: first models, training results, and measurements over all peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchange.payload import Replies
from fedsim.rng import numpy_rng
from fedsim.server.clientmetrics import over_clients
from fedsim.server.exchanges import Server
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights
from fedsim.topology.facts import facts
from fedsim.topology.traffic import Traffic
from strategies.averaging import Array, variances
from strategies.base import State

__all__ = [
    "chosen",
    "facts",
    "first_models",
    "geometry",
    "moved",
    "network_mean",
    "note_short",
    "spread",
    "traffic",
]

ROWS = 64  # models measured at once


def first_models(server: Server, kind: str) -> Weights:
    """A model per peer (N, d) and its statistics (N, b): ``independent`` draws or copies of one (``shared``)."""
    n, one = len(server.sizes), server.initial()
    if kind == "shared":
        return Weights(one.w.repeat(n, 1), one.buffers.repeat(n, 1))
    if server.fresh is None:
        raise ConfigError(
            "strategy.init_models=independent: peers cannot draw models of their own from a given initial state; "
            "type strategy.init_models=shared"
        )
    w, buffers = one.w.new_empty((n, len(one.w))), one.buffers.new_empty((n, len(one.buffers)))
    for peer in range(n):
        w[peer], buffers[peer] = server.fresh(peer)
    return Weights(w, buffers)


def moved(state: State, replies: Replies, *, in_place: bool = False) -> State:
    """The state after local training: every peer that answered moved by its ``delta``, which is used up.

    ``in_place``: the models may be overwritten; else they are left as they are.
    """
    delta, who, models = replies.stack("delta"), torch.tensor(replies.clients), state["peers"]
    if in_place:
        models.index_add_(0, who, delta)
    elif len(who) == len(models):
        models = delta.add_(models)
    else:
        models = models.index_add(0, who, delta)
    new = {**state, "peers": models}
    if ("buffers", "stack") in replies.folded:
        new["buffers"] = state["buffers"].index_copy(0, who, replies.stack("buffers"))
    return new


def those_there(state: State, name: str) -> Tensor:
    """The rows (n, d) of the models ``name`` of all peers but the absent."""
    models: Tensor = state[name]
    return models[state["there"]] if "there" in state else models


def network_mean(models: Tensor) -> Tensor:
    """Mean over peers, (N, d) to (d,); summed peer by peer in float64."""
    return torch.from_numpy(models.numpy().mean(axis=0, dtype=np.float64)).to(models.dtype)


def chosen(server: Server, count: int | None) -> Sequence[int]:
    """The peers that are measured: all, or always the same ``count`` of them."""
    if count is None or count >= server.num_clients:
        return server.clients
    picked = numpy_rng(server.seed, "server/measured").choice(server.num_clients, count, replace=False)
    return sorted(server.clients[i] for i in picked.tolist())


def spread(server: Server, found: Replies, domains: Sequence[str | None] | None = None) -> dict[str, float]:
    """Every metric over peers (see ``over_clients``), and the smallest and largest accuracy."""
    out = over_clients(found.ok, server.sizes, domains)
    values = [o.metrics["accuracy"] for o in found.ok if "accuracy" in o.metrics]
    return out | ({"accuracy_min": min(values), "accuracy_max": max(values)} if values else {})


def geometry(models: Array, start: Array, layout: Layout) -> dict[str, float]:
    """Consensus distance, ``mean_i |w_i - mean|``, and each tensor's variance, mean over peers, relative to the start.

    Tensors that started with one value (fresh biases) are left out.
    """
    mean = models.mean(axis=0, dtype=np.float64)
    total = 0.0
    for a in range(0, len(models), ROWS):
        total += float(np.sqrt(np.square(models[a : a + ROWS] - mean).sum(axis=1)).sum())
    out = {"consensus_distance": total / len(models)}
    now = variances(models, layout.params).mean(axis=0)
    for slot, first, value in zip(layout.params, start, now, strict=True):
        if first > 1e-30:
            out[f"variance/{slot.name}"] = float(value / first)
    return out


def note_short(server: Server, short: Mapping[int, str]) -> None:
    """Peers that got too few models for the aggregator and kept their own: named, or the run ends."""
    if short:
        who = ", ".join(map(str, sorted(short)))
        server.thin(f"peers that kept their own model: {who} ({short[min(short)]})")


def traffic(sent: csr_array, arrived: csr_array, size: int) -> Traffic:
    """Bytes that each peer sends and receives, of messages (N, N) of ``size`` bytes at (receiver, sender)."""
    up, down = sent.sum(axis=0) * size, arrived.sum(axis=1) * size
    return Traffic(up.astype(np.int64), down.astype(np.int64))
