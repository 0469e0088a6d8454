"""How a data set is split over clients: pure functions of labels and a generator.

Each is ``(labels (N,), num_clients, rng, *, ...) -> list of index arrays``: one sorted int64 array per
client, disjoint and together all N samples unless its docstring says otherwise. The same generator state
gives the same split. ``iid``, ``everything``, ``quantity`` and ``natural`` take targets of any kind (N, ...).
"""

from __future__ import annotations

import heapq

import numpy as np

from fedsim.data.adapter import from_partitioner
from fedsim.data.dealing import (
    Parts,
    apportion,
    assign,
    check,
    check_count,
    dirichlet_counts,
    parts_of,
    positive,
    with_minimum,
)
from fedsim.data.shards import Shards, holdout
from fedsim.errors import DataError

__all__ = ["Shards", "dirichlet", "from_partitioner", "holdout", "iid", "natural", "quantity", "shards"]


def iid(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Parts:
    """Shuffle and cut into parts whose sizes differ by at most one; some may be empty."""
    check_count(labels, num_clients)
    order = rng.permutation(len(labels))
    return parts_of(order, np.arange(len(labels)) * num_clients // max(len(labels), 1), num_clients)


def everything(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Parts:
    """Every client holds all samples."""
    check_count(labels, num_clients)
    return [np.arange(len(labels)) for _ in range(num_clients)]


def dirichlet(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: float,
    min_samples: int,
    balanced: bool = False,
    sampled: bool = False,
    per_class: int = 0,
) -> Parts:
    """Label skew by Dirichlet proportions; smaller ``alpha``, stronger skew.

    ``balanced=False``: for each class, q ~ Dir_m(alpha) is the share of its samples that each client gets
    (Yurochkin et al. 2019; Li et al. 2022, "Federated learning on non-IID data silos"). Sizes vary. The split
    is redrawn until every client has ``min_samples``, at most ``REDRAWS`` times; then clients short of it
    receive one sample at a time from the class that the then largest client has most of (ties: the lower
    index).

    ``balanced=True``: as in the code of FedSpeed (Sun et al. 2023), after Hsu et al. 2019: each client draws
    a class prior q ~ Dir_C(alpha) and floor(N / m) labels from it. A class that runs out is used again from
    its start, so **samples may repeat**, across clients and within one, and others may stay unused.

    ``sampled=True``: given q, every sample of the class draws its client from q on its own, as in the code of
    FedLoGe (Xiao et al. 2024), instead of q's shares being rounded. With ``min_samples=0`` clients may stay empty.

    Args:
        labels: class labels ``(N,)``, integers from 0.
        num_clients: m.
        rng: generator of all draws.
        alpha: concentration, > 0.
        min_samples: smallest number of samples a client may have.
        balanced: see above.
        sampled: see above.
        per_class: samples of every class that each client has before the rest is dealt out (1 in the code of
            Dai et al. 2025, GGEUR's single-domain split); not with ``balanced``.

    Raises:
        DataError: ``alpha`` is not positive, or ``min_samples`` or ``per_class`` is more than there is.
    """
    classes = check(labels, num_clients, min_samples)
    positive("alpha", alpha)
    if sampled and (balanced or per_class):
        raise DataError(
            "partition.sampled=true: not with balanced or per_class, which deal labels out themselves; choose one"
        )
    if balanced:
        if per_class:
            raise DataError(f"partition.per_class={per_class}: needs partition.balanced=false")
        return _balanced(labels, num_clients, rng, alpha, classes)
    if sampled:
        totals = np.bincount(labels, minlength=classes)

        def draw() -> np.ndarray:
            return rng.multinomial(totals, rng.dirichlet(np.full(num_clients, alpha), size=classes)).T

        return assign(labels, with_minimum(draw, min_samples), rng)
    counts = with_minimum(dirichlet_counts(labels, num_clients, rng, alpha, per_class), min_samples)
    return assign(labels, counts, rng)


def shards(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, *, shards_per_client: int
) -> Parts:
    """The pathological split of McMahan et al. 2017: sort by label, cut into shards, deal them out.

    There are ``num_clients * shards_per_client`` shards, whose sizes differ by at most one; within a class
    the order is shuffled first. A client sees about ``shards_per_client`` classes.
    """
    check(labels, num_clients)
    positive("shards_per_client", shards_per_client)
    total, count = len(labels), num_clients * shards_per_client
    if count > total:
        raise DataError(
            f"partition.shards_per_client={shards_per_client} for {num_clients} clients makes {count} shards "
            f"of {total} samples; give at most {total // num_clients}"
        )
    order = np.lexsort((rng.permutation(total), labels))
    dealt = rng.permutation(count) // shards_per_client  # shard -> client
    return parts_of(order, dealt[np.arange(total) * count // total], num_clients)


def quantity(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, *, alpha: float, min_samples: int
) -> Parts:
    """Quantity skew (Li et al. 2022): sizes q N with q ~ Dir_m(alpha), classes mixed as in ``iid``.

    ``min_samples`` is kept as in ``dirichlet``: up to ``REDRAWS`` draws, then the largest client gives.
    """
    check_count(labels, num_clients, min_samples)
    positive("alpha", alpha)

    def draw() -> np.ndarray:
        return apportion(rng.dirichlet(np.full(num_clients, alpha)), len(labels))[:, None]

    sizes = with_minimum(draw, min_samples)[:, 0]
    return parts_of(rng.permutation(len(labels)), np.repeat(np.arange(num_clients), sizes), num_clients)


def natural(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    *,
    ids: np.ndarray | None,
    choose: str = "merge",
    min_samples: int = 1,
) -> Parts:
    """Group samples by who made them: writer, role, hospital, domain.

    Ids with fewer than ``min_samples`` samples are left out. With as many clients as ids left, client i is
    the i-th smallest id. With fewer clients, ``choose`` decides:

    * ``merge``: every id goes to a client; from the largest id down, each to the client that has least so
      far.
    * ``largest``: the ids with most samples (ties: the smaller id), in id order; the other samples are
      **unused**.
    * ``random``: that many ids drawn by ``rng``, in id order; the other samples are **unused**.

    Args:
        labels: class labels ``(N,)``; only their number matters.
        num_clients: at most the number of ids.
        rng: used by ``random`` only.
        ids: natural id of each sample ``(N,)``.
        choose: see above.
        min_samples: smallest id that takes part.
    """
    check_count(labels, num_clients)
    if ids is None:
        raise DataError("partition=natural: this data set has no natural ids; type partition=dirichlet")
    if choose not in ("merge", "largest", "random"):
        raise DataError(f"partition.choose={choose!r}: give 'merge', 'largest' or 'random'")
    if np.shape(ids) != (len(labels),):
        raise DataError(f"ids have shape {np.shape(ids)}, labels {np.shape(labels)}")
    _, codes, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(sizes >= min_samples)
    if num_clients > len(kept):
        raise DataError(
            f"num_clients={num_clients}, but the data set has {len(kept)} natural ids with at least "
            f"{min_samples} samples; type num_clients={len(kept)} or fewer"
        )
    client_of_id = np.full(len(sizes), -1, dtype=np.int64)
    if choose == "merge" and num_clients < len(kept):
        client_of_id[kept] = _merge(sizes[kept], num_clients)
    else:
        if choose == "random":
            kept = np.sort(rng.permutation(kept)[:num_clients])
        else:
            kept = np.sort(kept[np.argsort(-sizes[kept], kind="stable")[:num_clients]])
        client_of_id[kept] = np.arange(num_clients)
    owner = client_of_id[codes]
    used = np.flatnonzero(owner >= 0)
    return parts_of(used, owner[used], num_clients)


def _balanced(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float, classes: int
) -> Parts:
    present = np.flatnonzero(np.bincount(labels, minlength=classes))
    priors = rng.dirichlet(np.full(len(present), alpha), size=num_clients)
    counts = rng.multinomial(len(labels) // num_clients, priors)
    samples, owner = [], []
    for column, label in enumerate(present):
        pool = rng.permutation(np.flatnonzero(labels == label))
        takers = rng.permutation(np.repeat(np.arange(num_clients), counts[:, column]))
        samples.append(pool[np.arange(len(takers)) % len(pool)])
        owner.append(takers)
    return parts_of(np.concatenate(samples), np.concatenate(owner), num_clients)


def _merge(sizes: np.ndarray, num_clients: int) -> np.ndarray:
    """Client of each id ``(K,)``: largest id first, to the client with least samples (ties: the lower
    index)."""
    clients = [(0, client) for client in range(num_clients)]
    out = np.empty(len(sizes), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        load, client = heapq.heappop(clients)
        out[group] = client
        heapq.heappush(clients, (load + int(sizes[group]), client))
    return out
