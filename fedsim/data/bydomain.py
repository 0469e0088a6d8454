"""Partitions of a data set with several domains: every client belongs to one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from fedsim.data.dealing import Parts, assign, check, check_count, dirichlet_counts, positive, with_minimum
from fedsim.data.partition import iid
from fedsim.errors import ConfigError, DataError


def domains(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    *,
    ids: np.ndarray | None,
    clients: Sequence[int] | None = None,
    alpha: float | None = None,
    skew: str = "within",
    share: float = 1.0,
    per_class: int = 0,
    min_samples: int = 1,
) -> Parts:
    """Split each domain over clients of its own, numbered domain by domain.

    * ``alpha=None``: a domain's samples are dealt out to its clients at random, in equal parts.
    * ``skew=within``: label skew among the clients of each domain, as ``dirichlet`` does it; nothing is unused.
    * ``skew=across``: for each class a vector q ~ Dir_m(alpha) over **all** clients; a client keeps
      floor(q n) of the n samples of that class in its domain, the rest is **unused**. With one client per
      domain this is Office-Home-LDS (released code of Dai et al. 2025).

    Args:
        labels: class labels ``(N,)``.
        num_clients: m, at least the number of domains.
        rng: generator of all draws.
        ids: domain of each sample ``(N,)``.
        clients: clients of each domain, in domain order; ``None``: as equal as possible.
        alpha: concentration of the label skew, or ``None``.
        skew: see above; read where ``alpha`` is given.
        share: part of each domain's samples that is used, drawn at random; the rest is **unused**.
        per_class: samples that a client has at least of every class of its domain; read where ``alpha`` is given.
        min_samples: smallest number of samples a client may have.

    Raises:
        DataError: no domains, fewer clients than domains, or too few samples for what is asked.
    """
    check_count(labels, num_clients, min_samples)
    classes = 0 if alpha is None else check(labels, num_clients)
    ids = _of_each(labels, ids)
    if skew not in ("within", "across") or not 0 < share <= 1:
        raise DataError(f"partition.skew={skew!r} share={share}: give within or across, and 0 < share <= 1")
    if alpha is not None:
        positive("alpha", alpha)
    names = np.unique(ids)
    wide = rng.dirichlet(np.full(num_clients, alpha), classes).T if alpha and skew == "across" else None
    parts: Parts = []
    for name, count in zip(names, clients_of_domains(len(names), num_clients, clients), strict=True):
        rows = rng.permutation(np.flatnonzero(ids == name))
        rows = np.sort(rows[: max(1, int(share * len(rows)))])
        own = labels[rows]
        if wide is not None:
            dealt = _keep(own, wide[len(parts) : len(parts) + count], rng, per_class)
        elif alpha is not None:
            draw = dirichlet_counts(own, count, rng, alpha, per_class)
            dealt = assign(own, with_minimum(draw, min(min_samples, len(own) // count)), rng)
        else:
            dealt = iid(own, count, rng)
        parts.extend(rows[part] for part in dealt)
    return _large_enough(parts, min_samples)


def clients_of_domains(domains: int, num_clients: int, clients: Sequence[int] | None) -> list[int]:
    """How many clients each domain has: as given, or equal up to one."""
    if clients is not None:
        given = [int(n) for n in clients]
        if len(given) != domains or min(given) < 1 or sum(given) != num_clients:
            raise DataError(
                f"partition.clients={given}: give {domains} numbers from 1 up, one per domain, that add up to "
                f"num_clients ({num_clients})"
            )
        return given
    if num_clients < domains:
        raise DataError(
            f"num_clients={num_clients}, but there are {domains} domains; type num_clients={domains} or more, or "
            "fewer data.domains"
        )
    return [(g + 1) * num_clients // domains - g * num_clients // domains for g in range(domains)]


def _of_each(labels: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """The domain of each sample, refused where there is none."""
    if ids is None:
        raise DataError("partition=domains: this data set has no domains; type partition=dirichlet")
    if np.shape(ids) != (len(labels),):
        raise DataError(f"ids have shape {np.shape(ids)}, labels {np.shape(labels)}")
    return ids


def _large_enough(parts: Parts, min_samples: int) -> Parts:
    """``parts``, refused if one is smaller."""
    for client, part in enumerate(parts):
        if len(part) < min_samples:
            raise DataError(
                f"client {client} would have {len(part)} samples, partition.min_samples={min_samples}; raise "
                "partition.alpha or partition.share, or give another seed"
            )
    return parts


def _keep(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator, per_class: int) -> Parts:
    """Parts of a domain with ``labels (n,)``: floor(q n_c) of class c by ``shares (clients, C)``; the rest is left."""
    totals = np.bincount(labels, minlength=shares.shape[1])
    counts = np.maximum(np.floor(shares * totals).astype(np.int64), np.where(totals > 0, per_class, 0))
    if (counts.sum(axis=0) > totals).any():
        label = int(np.argmax(counts.sum(axis=0) > totals))
        raise DataError(
            f"partition.per_class={per_class}: {len(shares)} clients of a domain with {totals[label]} samples of "
            f"class {label}"
        )
    return assign(labels, np.vstack((counts, totals - counts.sum(axis=0))), rng)[:-1]


def domain_names(domains: Any, clients: Any, test: Any) -> list[str]:
    """The names of the clients' domains as they were handed over beside ``clients``, as a list of texts.

    ``test``: pairs by domain, whose names are looked at too, or anything else.

    Raises:
        ConfigError: naming what is no name, and where.
    """
    if clients is None:
        raise ConfigError(
            "domains: names the domain of each of clients=[...]; samples that are to be split bring theirs along "
            "(fedsim.data.Dataset(..., groups=...))"
        )
    if isinstance(domains, str | bytes | Mapping | Set) or not hasattr(domains, "__iter__"):
        raise ConfigError(
            f"domains: got {type(domains).__name__}; expected a list, the name of each client's domain: "
            "domains=['north', 'north', 'south']"
        )
    names = list(domains)
    if hasattr(clients, "__len__") and len(names) != len(clients):
        raise ConfigError(f"domains: {len(names)} names for {len(clients)} clients; give one per client")
    tests = list(test) if isinstance(test, Mapping) else []
    for where, name in [(f"client {i}", n) for i, n in enumerate(names)] + [("test", n) for n in tests]:
        if not isinstance(name, str):
            raise ConfigError(
                f"domains: {where} has {name!r} ({type(name).__name__}); a name is text, e.g. {str(name)!r}"
            )
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"domains: {where} has {name!r}; a name is text that can be read")
    return [str(name) for name in names]
