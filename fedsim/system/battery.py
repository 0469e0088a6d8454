"""Batteries: what clients spend drains them, being plugged in fills them, and who has too little is not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from fedsim.errors import check_setting
from fedsim.system.availability import Availability, Presence

_check = partial(check_setting, "system.battery")

WH = 3600.0  # joules


@dataclass(frozen=True, kw_only=True)
class Battery:
    """How batteries are used: clients below ``threshold`` (a share of the capacity) cannot be asked.

    A client gains ``charge_watts`` while it is plugged in: whenever ``charging`` has it there, by default whenever it
    is there at all (phones that train while they charge).
    """

    threshold: float
    charge_watts: float
    charging: Availability | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.threshold < 1, "threshold", self.threshold, "must be in [0, 1)")
        _check(self.charge_watts >= 0, "charge_watts", self.charge_watts, "must not be negative")


@dataclass
class Batteries:
    """Levels of m batteries, as they were when their clients last spent something: O(clients asked) to keep up.

    ``capacity`` (m,) in joules, infinite without a battery; ``level`` (m,) in joules at virtual time ``since`` (m,).
    """

    rule: Battery
    plugged: Presence
    capacity: np.ndarray
    level: np.ndarray
    since: np.ndarray = field(init=False)
    touched: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.since = np.zeros(len(self.capacity))

    def at(self, ids: np.ndarray, now: float) -> np.ndarray:
        """Joules (n,) that the batteries of ``ids`` hold: the last level and what was charged since."""
        gained = self.rule.charge_watts * self.plugged.during(ids, self.since[ids], now)
        return np.asarray(np.minimum(self.level[ids] + gained, self.capacity[ids]))

    def share(self, ids: np.ndarray, now: float) -> np.ndarray:
        """The same as shares of the capacity; NaN without a battery."""
        known = np.where(np.isfinite(self.capacity[ids]), self.capacity[ids], np.nan)
        return np.asarray(self.at(ids, now) / known)

    def low(self, ids: np.ndarray, now: float) -> np.ndarray:
        """Mask (n,) of those that have too little to be asked."""
        return np.asarray(self.share(ids, now) < self.rule.threshold)

    def spend(self, ids: np.ndarray, joules: np.ndarray, now: float) -> None:
        """Take ``joules`` (n,) from the batteries of ``ids``, which thereby never fall below empty."""
        own = np.isfinite(self.capacity[ids])
        ids, joules = ids[own], joules[own]
        self.level[ids] = np.maximum(self.at(ids, now) - joules, 0.0)
        self.since[ids] = now
        self.touched.update(ids.tolist())

    def save(self) -> list[list[float]]:
        """Client, level and time of all that spent anything, for a checkpoint."""
        return [[c, float(self.level[c]), float(self.since[c])] for c in sorted(self.touched)]

    def restore(self, saved: Sequence[Sequence[float]]) -> None:
        """Go on from what ``save`` gave."""
        for client, level, since in saved:
            self.level[int(client)], self.since[int(client)] = level, since
            self.touched.add(int(client))


def lasting(joules: np.ndarray, *parts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Seconds (n,) after which ``joules`` (n,) are used up by ``parts`` done in turn: seconds (n,) at watts (n,) each.

    Infinite where they are enough.
    """
    out, left, going = np.zeros(len(joules)), joules.copy(), np.ones(len(joules), dtype=bool)
    for seconds, watts in parts:
        needed = seconds * np.nan_to_num(watts)
        enough = going & (left >= needed)
        out += np.where(enough, seconds, np.where(going, left / np.maximum(np.nan_to_num(watts), 1e-12), 0.0))
        left, going = left - needed, enough
    return np.where(going, np.inf, out)
