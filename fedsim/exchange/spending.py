"""What each client has spent, where the noise is its own: releases of its vectors, or noisy steps on its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from fedsim.exchange.accounting import ADD_REMOVE, REPLACE, Mechanism, gaussian_epsilon
from fedsim.exchange.payload import Outcome
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import EVENTS

Rates = Mapping[int, tuple[int, int]]  # by client: samples of an expected batch, and samples


class Spending:
    """Counts by client. ``rates``: of record-level privacy, how each client's batches are drawn."""

    def __init__(self, privacy: Privacy, rates: Rates | None = None):
        self._privacy, self._rates = privacy, rates or {}
        self._counts: dict[int, int] = {}
        self._most = 1.0  # events of a round in multiples of its steps: of rules with two gradients a step 2

    def add(self, ok: Sequence[Outcome], planned: Mapping[int, int]) -> None:
        """Count what one exchange released; ``planned``: steps that each client was to take."""
        for o in ok:
            events = 1 if self._privacy.local else int(cast(int, o.values.get(EVENTS, 0)))
            if events:
                self._counts[o.client] = self._counts.get(o.client, 0) + events
                self._most = max(self._most, events / planned.get(o.client, events))

    def epsilon(self, client: int, more: int = 0) -> float:
        """What a client has spent, after ``more`` further events."""
        return self._cost(self._counts.get(client, 0) + more, self._rates.get(client, (1, 1)))

    def _cost(self, count: int, rate: tuple[int, int]) -> float:
        assert self._privacy.delta is not None
        return cost(self._privacy.level, self._privacy.multiplier, count, rate, self._privacy.delta)

    def exceeds(self, most: float, events: Mapping[int, int]) -> bool:
        """Whether any client could have spent more than ``most`` after ``events`` more of its own (default: one)."""
        clients = set(self._counts) | set(events) or {-1}  # whoever it is, its first costs the same
        return any(self.epsilon(c, math.ceil(self._most * events.get(c, 1))) > most for c in clients)

    def row(self) -> dict[str, Any]:
        """Entries of the round's row: the most that a client has spent, and the mean over those that took part."""
        found = [self.epsilon(c) for c in self._counts] or [0.0]
        privacy = self._privacy
        return {
            "epsilon": max(found),
            "epsilon_mean": math.fsum(found) / len(found),
            "delta": privacy.delta,
            "relation": REPLACE if privacy.local else ADD_REMOVE,
            "z": privacy.multiplier,
            "C": float(privacy.clip),
            "epsilon_valid": True,
        }

    def save(self) -> dict[str, Any]:
        """Plain counts, for a checkpoint."""
        return {"counts": {str(c): n for c, n in self._counts.items()}, "most": self._most}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave."""
        self._counts, self._most = {int(c): n for c, n in saved["counts"].items()}, saved["most"]


@cache
def cost(level: str, z: float, count: int, rate: tuple[int, int], delta: float) -> float:
    """Epsilon of ``count`` events of one client.

    ``local``: releases of its whole vector, of which another client's would differ by up to 2 C, mu = 2 sqrt(k) / z,
    exact. ``record``: steps on batches of ``rate[0]`` expected samples of ``rate[1]``, each by an independent coin.
    """
    if not count:
        return 0.0
    if z == 0:
        return math.inf
    if level == "local":
        return gaussian_epsilon(2 * math.sqrt(count) / z, delta)
    batch, n = rate
    return Mechanism(event="poisson", z=z, n=max(n, 1), m=max(1, min(batch, n))).epsilon(count, delta)[0]
