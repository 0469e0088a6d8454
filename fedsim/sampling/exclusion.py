"""Clients that are registered but never there: who is left, and who takes the place of one that was drawn.

A cohort that would have been drawn from everybody stays as it is, but for those who are absent: they are left out, or
each makes room for the next client of a random order of its own. So no other client's membership changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedsim.rng import numpy_rng


@dataclass(frozen=True)
class Roster:
    """Of ``registered`` clients those who are there: all but ``absent``."""

    registered: int
    absent: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.registered - len(self.absent)

    @cached_property
    def present(self) -> Sequence[int]:
        """Ids of those who are there, ascending."""
        everybody = range(self.registered)
        return [c for c in everybody if c not in self.absent] if self.absent else everybody


def draw_held_out(seed: int, num_clients: int, share: float) -> frozenset[int]:
    """Ids of the clients held out for good: ``share`` of all, rounded, at least one unless that is 0."""
    if not share:
        return frozenset()
    count = max(1, int(share * num_clients + 0.5))
    return frozenset(numpy_rng(seed, "held_out_clients").choice(num_clients, count, replace=False).tolist())
