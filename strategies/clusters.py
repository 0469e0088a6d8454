"""Clusters of clients: how two clusterings agree, models far apart, nearest centres, bipartition by cosines."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage, to_tree
from torch import Tensor

from fedsim.exchange.payload import Replies


def adjusted_rand(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Adjusted Rand index of two labellings of the same things (Hubert, Arabie 1985); 1: the same clusters."""
    counts = np.zeros((len(set(a)), len(set(b))))
    rows, columns = ({v: i for i, v in enumerate(dict.fromkeys(labels))} for labels in (a, b))
    for x, y in zip(a, b, strict=True):
        counts[rows[x], columns[y]] += 1

    def pairs(n: np.ndarray) -> float:
        return float((n * (n - 1) / 2).sum())

    both, first, second = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0))
    whole = len(a) * (len(a) - 1) / 2
    expected = first * second / whole if whole else 0.0
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def squared_distances(models: Tensor, centres: Tensor) -> Tensor:
    """(n, k), float64, between models (n, d) and centres (k, d)."""
    return torch.stack([(models - c).square().sum(1, dtype=torch.float64) for c in centres], dim=1)


def nearest(models: Tensor, centres: Tensor) -> Tensor:
    """The centre (n,) of ``centres`` (k, d) nearest to each model (n, d), the first if several are."""
    return torch.from_numpy(squared_distances(models, centres).numpy().argmin(1))


def far_apart(models: Tensor, k: int) -> list[int]:
    """``k`` rows of ``models`` (n, d): the first, then always the one farthest from those taken."""
    taken = [0]
    gap = squared_distances(models, models[:1])[:, 0]
    while len(taken) < k:
        gap[taken] = -1.0
        taken.append(int(gap.numpy().argmax()))
        gap = torch.minimum(gap, squared_distances(models, models[taken[-1:]])[:, 0])
    return taken


def cosines(deltas: Tensor) -> Tensor:
    """(n, n), float64: ``d_i d_j / (|d_i| |d_j| + 1e-12)`` of updates (n, d)."""
    x = deltas.double()
    norms = x.norm(dim=1)
    out: Tensor = (x @ x.T) / (norms[:, None] * norms + 1e-12)
    return out


def bipartition(similarity: Tensor) -> tuple[list[int], list[int]]:
    """Two halves by complete linkage on minus the ``similarity`` (n, n), n >= 2; the first holds row 0."""
    n = len(similarity)
    upper = np.triu_indices(n, 1)
    s = similarity.double().numpy()
    root = to_tree(linkage(1 - (s[upper] + s.T[upper]) / 2, method="complete"))
    halves = [sorted(node.pre_order()) for node in (root.left, root.right)]
    return (halves[0], halves[1]) if 0 in halves[0] else (halves[1], halves[0])


def separation(similarity: Tensor, first: Sequence[int], second: Sequence[int]) -> float:
    """Mean cosine of pairs inside the two halves minus that of pairs across; halves of one have no pair inside."""
    s = similarity.double()
    inside = [s[i, j] for half in (first, second) for i in half for j in half if i < j]
    across = s[list(first)][:, list(second)].mean()
    return float((torch.stack(inside).mean() if inside else s.new_tensor(1.0)) - across)


def of_members(replies: Replies, members: Sequence[int]) -> Replies:
    """The replies of some of the clients, folded anew from single contributions, in client order."""
    here = set(members)
    rows = [i for i, o in enumerate(replies.ok) if o.client in here]
    if len(rows) == len(replies) and ("delta", "mean") in replies.folded:
        return replies
    ok = [o for o in replies.ok if o.client in here]
    folded: dict[tuple[str, str], Tensor] = {}
    for name, kind in replies.folded:
        if kind == "stack":
            stack = replies.stack(name)[rows]
            folded[name, "stack"] = stack
            if rows:
                folded[name, "mean"] = _summed(stack, [o.weight for o in ok])
    return Replies(ok, folded, log={})


def _summed(stack: Tensor, weights: Sequence[float]) -> Tensor:
    total = stack[0] * weights[0]
    for row, weight in zip(stack[1:], weights[1:], strict=True):
        total.add_(row, alpha=weight)
    return total


def sizes(assignment: Tensor, k: int) -> list[int]:
    """How many clients each of ``k`` clusters has."""
    return torch.bincount(assignment[assignment >= 0].long(), minlength=k).tolist()


def agreement(assignment: Tensor, domains: Sequence[str | None] | None) -> Mapping[str, float]:
    """``ari`` of the clusters of known clients with their domains, where there are several domains."""
    if domains is None:
        return {}
    known = [c for c, a in enumerate(assignment.tolist()) if a >= 0 and domains[c] is not None]
    if len({domains[c] for c in known}) < 2:
        return {}
    return {"ari": adjusted_rand([int(assignment[c]) for c in known], [domains[c] for c in known])}
