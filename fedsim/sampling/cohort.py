"""The cohort of a round, drawn or given. Cost follows the cohort, not the population."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedsim.errors import ConfigError
from fedsim.exchange.normals import secret_rng
from fedsim.rng import numpy_rng


def sample(
    seed: int,
    round: int,
    num_clients: int,
    per_round: int,
    participation: str = "fixed",
    *,
    empty: bool = False,
    cap: int | None = None,
    secret: bool = False,
) -> list[int]:
    """Client ids of a round, ascending. The same for every method that shares the seed.

    ``fixed``: ``per_round`` clients, uniformly without replacement. ``bernoulli``: each client independently with
    probability ``per_round / num_clients``, redrawn while nobody takes part unless a cohort may be ``empty``; of more
    than ``cap`` a random ``cap``. ``secret``: drawn by the operating system, not by the seed.
    """
    rng = secret_rng() if secret else numpy_rng(seed, "cohort", round)
    size = per_round
    if participation == "bernoulli":
        size = int(rng.binomial(num_clients, per_round / num_clients))
        while size == 0 and not empty:
            size = int(rng.binomial(num_clients, per_round / num_clients))
        size = size if cap is None else min(size, cap)
    if size == num_clients:
        return list(range(num_clients))
    return sorted(rng.choice(num_clients, size, replace=False, shuffle=False).tolist())


def check_cohorts(
    cohorts: Sequence[Sequence[int]],
    rounds: int,
    num_clients: int,
    absent: Collection[int] = (),
) -> list[list[int]]:
    """Given cohorts, one per round: ids must exist, be distinct and not ``absent``; returned ascending."""
    if isinstance(cohorts, str | Mapping) or not hasattr(cohorts, "__len__"):
        raise ConfigError(
            f"cohorts: got {type(cohorts).__name__}; expected one list of client ids a round: cohorts=[[0, 3], [1, 2]]"
        )
    if len(cohorts) < rounds:
        raise ConfigError(
            f"cohorts: {len(cohorts)} rounds given, but rounds={rounds}; give one list of client ids a round"
        )
    out = []
    for t, ids in enumerate(cohorts):
        ids = _whole(t, ids)
        bad = [i for i in ids if not 0 <= i < num_clients]
        if bad:
            raise ConfigError(
                f"cohorts[{t}]: client {bad[0]} does not exist; ids go from 0 to {num_clients - 1}"
            )
        if gone := [i for i in ids if i in absent]:
            raise ConfigError(
                f"cohorts[{t}]: client {gone[0]} is never there (exclude, evaluation.held_out_clients); leave it out"
            )
        if len(set(ids)) < len(ids):
            raise ConfigError(f"cohorts[{t}]: a client is listed twice: {sorted(ids)}")
        out.append(sorted(ids))
    return out


def _whole(t: int, ids: Any) -> list[int]:
    """The ids of round ``t``, as they were given."""
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise ConfigError(
            f"cohorts[{t}]={ids!r}: expected a list of client ids, whole numbers: cohorts=[[0, 3], [1, 2]]"
        ) from None
