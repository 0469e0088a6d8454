"""What each client has spent, where the noise is its own: releases of its vectors, or noisy steps on its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from fedsim.exchange.accounting import ADD_REMOVE, REPLACE, Mechanism, gaussian_epsilon
from fedsim.exchange.ledger import Ledger
from fedsim.exchange.payload import Outcome
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import EVENTS

Rates = Mapping[int, tuple[int, int]]  # by client: samples of an expected batch, and samples


class Spending:
    """Counts by client. ``rates``: of record-level privacy, how each client's batches are drawn; ``planned``: noisy
    gradients of each in a round."""

    def __init__(
        self,
        privacy: Privacy,
        rates: Rates | None = None,
        planned: Mapping[int, int] | None = None,
        ledger: Ledger | None = None,
    ):
        self._privacy, self._rates, self._planned, self._ledger = privacy, rates or {}, planned or {}, ledger
        self._counts: dict[int, int] = {}
        self._most = 1.0  # events of a round in multiples of its steps: of rules with two gradients a step 2
        self._round = self._exchange = 0
        self._count_again(0)

    def begin(self, round: int, clients: Sequence[int], vectors: Sequence[str]) -> None:
        """Note whom an exchange of ``round`` (from 1) asks to release something, on disk before anybody does."""
        if self._ledger is None or not vectors:
            return
        self._exchange = self._exchange + 1 if round == self._round else 0
        self._round, privacy = round, self._privacy
        about = {"vectors": list(vectors), "z": privacy.multiplier, "clip": float(privacy.clip)}
        self._ledger.write(round, self._exchange, **about, clients=list(clients))

    def add(self, outcomes: Sequence[Outcome], deployed: bool = False) -> None:
        """Count what one exchange released; where it was ``deployed`` also of those whose updates did not count, which
        may have left them."""
        left = ("ok", "dropped", "failed", "nonfinite") if deployed else ("ok",)
        for o in outcomes:
            if o.kind in left:
                events = self._events(o.client) if o.kind != "ok" else int(cast(int, o.values.get(EVENTS, 0)))
                self._count(o.client, 1 if self._privacy.local else events)

    def _events(self, client: int) -> int:
        """Of an exchange in which nothing is known of what the client did."""
        return 1 if self._privacy.local else math.ceil(self._most * self._planned.get(client, 0))

    def _count(self, client: int, events: int) -> None:
        if events:
            self._counts[client] = self._counts.get(client, 0) + events
            self._most = max(self._most, events / self._planned.get(client, events))

    def _count_again(self, releases: int) -> None:
        """Count what was released after the ledger's first ``releases`` and is released anew, by other noise."""
        for client in self._ledger.again(releases) if self._ledger is not None else []:
            self._count(client, self._events(client))

    def epsilon(self, client: int, more: int = 0) -> float:
        """What a client has spent, after ``more`` further events."""
        return self._cost(self._counts.get(client, 0) + more, self._rates.get(client, (1, 1)))

    def _cost(self, count: int, rate: tuple[int, int]) -> float:
        assert self._privacy.delta is not None
        return cost(self._privacy.level, self._privacy.multiplier, count, rate, self._privacy.delta)

    def exceeds(self, most: float) -> bool:
        """Whether any client could have spent more than ``most`` after its events of one more round."""
        events = self._planned
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
        noted = 0 if self._ledger is None else len(self._ledger)
        return {"counts": {str(c): n for c, n in self._counts.items()}, "most": self._most, "noted": noted}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave.

        Raises:
            CheckpointError: if the ledger has lost releases since.
        """
        self._counts, self._most = {int(c): n for c, n in saved["counts"].items()}, saved["most"]
        if self._ledger is not None:
            self._ledger.check(saved.get("noted", 0))
            self._count_again(saved.get("noted", 0))


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
