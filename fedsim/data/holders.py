"""Classes that only some clients have: the split of open-world experiments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.data.dealing import Parts, check, parts_of
from fedsim.errors import DataError


def by_holders(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, *, holders: Sequence[tuple[int, int]] = ()
) -> Parts:
    """Equal random parts of every class, dealt to all clients, or to as many as ``holders`` says of it.

    ``holders=[[7, 2], [9, 1]]``: two clients have class 7, one has class 9, drawn from one shuffled row of all, so
    that nobody has a second such class before everybody has one.

    Raises:
        DataError: for a class that does not exist, or a number outside 1 to ``num_clients``.
    """
    classes, wanted = check(labels, num_clients), {int(c): int(n) for c, n in holders}
    for c, n in wanted.items():
        if not 0 <= c < classes:
            raise DataError(f"partition.holders: there is no class {c}; there are {classes}, from 0")
        if not 1 <= n <= num_clients:
            raise DataError(f"partition.holders: class {c} for {n} clients; give 1 to {num_clients}")
    row, taken = rng.permutation(num_clients), 0
    samples, owners = [], []
    for c in range(classes):
        own = rng.permutation(np.flatnonzero(labels == c))
        who = np.arange(num_clients)
        if c in wanted:
            who = row[(taken + np.arange(wanted[c])) % num_clients]
            taken += wanted[c]
        samples.append(own)
        owners.append(who[np.arange(len(own)) * len(who) // max(len(own), 1)])
    return parts_of(np.concatenate(samples), np.concatenate(owners), num_clients)
