"""What a graph promises before anything is learned: degrees, spectral gap, the variance that plain mixing leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, eigs

from fedsim.topology.base import Topology
from fedsim.topology.mixing import Mixing

DENSE = 400  # peers up to which all eigenvalues are computed


def facts(topology: Topology, mix: Mixing) -> dict[str, Any]:
    """Numbers of the graph at time 0 under the mixing matrix W.

    ``spectral_gap``: ``1 - |lambda_2(W)|`` (None where it did not converge). ``variance_after_one_mix``: mean over
    peers of ``sum_j W_ij^2``, what is left of the variance of uncorrelated weights; ``variance_limit``: the same of
    W^t for large t, ``sum_j pi_j^2`` with the stationary distribution pi of each connected part.
    """
    w, graph, degrees = csr_array(mix.others + diags_array(mix.own)), topology.at(), topology.degrees()
    if topology.absent:
        there = topology.present
        w, graph, degrees = w[there][:, there], graph[there][:, there], degrees[there]
    parts, label = connected_components(graph, directed=True, connection="weak")
    return {
        "graph": topology.label,
        "peers": w.shape[0],
        "directed": topology.directed,
        "fixed": topology.fixed,
        "edges": int(topology.at().nnz if topology.directed else topology.at().nnz // 2),
        "connected_parts": int(parts),
        "degree_min": int(degrees.min()),
        "degree_mean": float(degrees.mean()),
        "degree_max": int(degrees.max()),
        "spectral_gap": spectral_gap(w),
        "variance_after_one_mix": float(w.multiply(w).sum(axis=1).mean()),
        "variance_limit": _limit(w, label, parts),
    }


def spectral_gap(w: csr_array) -> float | None:
    """``1 - |lambda_2|`` of a row-stochastic matrix (N, N)."""
    n = w.shape[0]
    if n < 2:
        return 1.0
    if n <= DENSE:
        values = np.linalg.eigvals(w.toarray())
    else:
        start = np.random.default_rng(0).random(n)
        try:
            values = eigs(w, k=2, v0=start, return_eigenvectors=False)
        except ArpackError:
            return None
    return float(1 - np.sort(np.abs(values))[-2])


def _limit(w: csr_array, label: np.ndarray, parts: int, steps: int = 20_000) -> float:
    n = w.shape[0]
    pi, turned = np.full(n, 1 / n), csr_array(w.T)
    for _ in range(steps):
        following = turned @ pi
        done = np.abs(following - pi).sum() < 1e-13
        pi = following
        if done:
            break
    share = np.bincount(label, minlength=parts) / n
    return float((share * np.bincount(label, (pi / share[label]) ** 2, parts)).sum())
