"""When clients can take part: always, at random, by day and night, or as phones were seen to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from fedsim import rng
from fedsim.errors import DataError, check_setting
from fedsim.system.devices import read_table

_check = partial(check_setting, "system.availability")

HOUR, DAY = 3600.0, 86400.0  # seconds
SLOTS = 10_000  # how far ahead a chance presence is followed


class Presence(Protocol):
    """Who is there, as a function of virtual time."""

    def until(self, ids: np.ndarray, now: float) -> np.ndarray:
        """For each of ``ids`` (n,) the time at which it will leave; ``now`` where it is absent."""

    def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
        """Seconds (n,) that each of ``ids`` is there from its ``start`` (n,) to ``end``."""


class Availability(Protocol):
    """A configured rule of availability."""

    def start(self, num_clients: int, seed: int) -> Presence:
        """The rule for so many clients, its draws keyed by the seed."""


class Always:
    """Everybody, at any time."""

    def start(self, num_clients: int, seed: int) -> Always:
        """Nothing to draw."""
        return self

    def until(self, ids: np.ndarray, now: float) -> np.ndarray:
        """Nobody ever leaves."""
        return np.full(len(ids), np.inf)

    def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
        """All the time."""
        return np.asarray(end - start)


@dataclass(frozen=True, kw_only=True)
class Random:
    """In every slot of ``every`` seconds each client is there with probability ``p``, independently."""

    p: float
    every: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check(0 < self.p <= 1, "p", self.p, "must be in (0, 1]")
        _check(self.every > 0, "every", self.every, "must be positive, in seconds")

    def start(self, num_clients: int, seed: int) -> Random:
        """Keyed by the seed."""
        return Random(p=self.p, every=self.every, seed=seed)

    def until(self, ids: np.ndarray, now: float) -> np.ndarray:
        """The end of the last slot in a row in which the client is there."""
        if self.p == 1:
            return np.full(len(ids), np.inf)
        slot, out, there = int(now // self.every), np.full(len(ids), float(now)), np.arange(len(ids))
        for ahead in range(SLOTS):
            there = there[rng.uniforms(self.seed, "available", ids[there], slot + ahead) < self.p]
            if not len(there):
                break
            out[there] = (slot + ahead + 1) * self.every
        return out

    def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
        """Slot by slot."""
        out = np.zeros(len(ids))
        for slot in range(int(start.min(initial=end) // self.every), int(end // self.every) + 1):
            there = rng.uniforms(self.seed, "available", ids, slot) < self.p
            inside = np.minimum(end, (slot + 1) * self.every) - np.maximum(start, slot * self.every)
            out += np.where(there, np.maximum(inside, 0.0), 0.0)
        return out


@dataclass(frozen=True, kw_only=True)
class Diurnal:
    """Each client is there for ``hours`` of every day, from an hour of its own: normal around ``start``, ``spread``.

    Second 0 is a midnight. Window lengths are normal around ``hours`` with a quarter of it as deviation, within
    [0.1, 24].
    """

    hours: float
    start_hour: float
    spread: float

    def __post_init__(self) -> None:
        _check(0 < self.hours <= 24, "hours", self.hours, "must be in (0, 24]")
        _check(self.spread >= 0, "spread", self.spread, "must not be negative, in hours")

    def start(self, num_clients: int, seed: int) -> Windows:
        """Draw each client's window."""
        draw = rng.numpy_rng(seed, "diurnal")
        begin = self.start_hour + self.spread * draw.standard_normal(num_clients)
        length = self.hours * (1 + 0.25 * draw.standard_normal(num_clients))
        return Windows((begin % 24) * HOUR, np.clip(length, 0.1, 24) * HOUR)


@dataclass(frozen=True, eq=False)
class Windows:
    """One window a day per client: its beginning (m,) and length (m,), in seconds."""

    begin: np.ndarray
    length: np.ndarray

    def until(self, ids: np.ndarray, now: float) -> np.ndarray:
        """The end of the client's window."""
        since = (now - self.begin[ids]) % DAY
        left = np.where(self.length[ids] >= DAY, np.inf, self.length[ids] - since)
        return now + np.maximum(left, 0.0)

    def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
        """Whole days by the window's length, the rest of a day up to it."""
        length = np.minimum(self.length[ids], DAY)

        def until(t: np.ndarray) -> np.ndarray:
            days, rest = np.divmod(t - self.begin[ids], DAY)
            return np.asarray(days * length + np.minimum(rest, length))

        return np.asarray(until(np.full(len(ids), end)) - until(start))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Intervals of real devices, ``client,start_s,end_s`` in a CSV or Parquet file; each client follows one of them.

    Time is taken modulo ``period`` seconds (a day: several recorded days lie over each other). Devices without an
    interval are no candidates.
    """

    path: str
    period: float

    def __post_init__(self) -> None:
        _check(self.period > 0, "period", self.period, "must be positive, in seconds")

    def start(self, num_clients: int, seed: int) -> Intervals:
        """Read the file and draw a device for each client."""
        frame = read_table(Path(self.path))
        if missing := {"client", "start_s", "end_s"} - set(frame):
            raise DataError(f"{self.path}: no column {sorted(missing)[0]!r}; expected client, start_s, end_s")
        spans = fold(
            frame.client.to_numpy(), frame.start_s.to_numpy(float), frame.end_s.to_numpy(float), self.period
        )
        if not len(spans):
            raise DataError(f"{self.path}: no interval with end_s after start_s")
        devices, row = np.unique(spans[:, 0], return_inverse=True)
        who = rng.numpy_rng(seed, "trace").integers(len(devices), size=num_clients)
        return Intervals(who, row, spans[:, 1], spans[:, 2], self.period)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Disjoint intervals ``[begin, end)`` of devices ``row``, sorted; client i follows device ``who[i]``."""

    who: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    period: float

    def until(self, ids: np.ndarray, now: float) -> np.ndarray:
        """The end of the interval; one that reaches the end of the period goes on at its beginning."""
        at = now % self.period
        left = self._left(self.who[ids], np.full(len(ids), at))
        wraps = (left > 0) & (left >= self.period - at - 1e-9)
        left[wraps] += self._left(self.who[ids][wraps], np.zeros(int(wraps.sum())))
        return now + left

    def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
        """Whole periods by the sum of the device's intervals, the rest up to where it lies."""
        device, upto = self.who[ids], np.concatenate([[0.0], np.cumsum(self.end - self.begin)])
        first, behind = (np.searchsorted(self.row, device, side=s) for s in ("left", "right"))

        def until(t: np.ndarray) -> np.ndarray:
            periods, at = np.divmod(t, self.period)
            begun = np.searchsorted(
                self.row * self.period + self.begin, device * self.period + at, side="right"
            )
            whole = upto[np.maximum(begun, first)] - upto[first]
            return np.asarray(periods * (upto[behind] - upto[first]) + whole - self._left(device, at))

        return np.asarray(until(np.full(len(ids), end)) - until(start))

    def _left(self, device: np.ndarray, at: np.ndarray) -> np.ndarray:
        keys = self.row * self.period + self.begin
        place = np.searchsorted(keys, device * self.period + at, side="right") - 1
        inside = (place >= 0) & (self.row[place] == device)
        return np.where(inside, np.maximum(self.end[place] - at, 0.0), 0.0)


def fold(client: np.ndarray, start: np.ndarray, end: np.ndarray, period: float) -> np.ndarray:
    """Intervals modulo ``period``, cut at its border and joined where they meet: ``(n, 3)`` client, begin, end."""
    pieces = []
    for who, a, b in zip(client, start, end, strict=True):
        while a < b:
            border = (a // period + 1) * period
            pieces.append((float(who), a % period, min(b, border) - a + a % period))
            a = border
    out: list[list[float]] = []
    for who, a, b in sorted(pieces):
        if out and out[-1][0] == who and a <= out[-1][2]:
            out[-1][2] = max(out[-1][2], b)
        else:
            out.append([who, a, b])
    return np.array(out).reshape(-1, 3)
