"""Classes that only some clients have."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data.holders import by_holders
from fedsim.errors import DataError

LABELS = np.repeat(np.arange(5), [20, 20, 12, 9, 6])


def table(seed: int = 0, clients: int = 5, **holders: int) -> np.ndarray:
    wanted = [(int(k[1:]), n) for k, n in holders.items()]
    parts = by_holders(LABELS, clients, np.random.default_rng(seed), holders=wanted)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    return np.stack([np.bincount(LABELS[p], minlength=5) for p in parts])


def test_named_classes_lie_at_as_many_clients_and_the_others_at_all() -> None:
    found = table(c2=2, c3=2, c4=1)
    assert (found[:, :2] == 4).all()
    assert ((found > 0).sum(0) == [5, 5, 2, 2, 1]).all()
    assert sorted(found[:, 2][found[:, 2] > 0]) == [6, 6] and found[:, 4].max() == 6
    assert (found[:, 2:] > 0).sum(1).tolist() == [1] * 5  # nobody has a second before all have one
    assert (table() > 0).all() and not (table(1, c4=1) == found).all()


def test_impossible_holders_are_refused() -> None:
    with pytest.raises(DataError, match="there is no class 7; there are 5"):
        table(c7=1)
    with pytest.raises(DataError, match="class 2 for 6 clients; give 1 to 5"):
        table(c2=6)
