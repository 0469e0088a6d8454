"""How long things take, in ticks of virtual time: training steps of peers, and messages between them.

A duration is called with a generator, the peer, how many draws are wanted and the size of the message (0 for a
training step), and gives an array of ticks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.config.textfile import read_text
from fedsim.errors import ConfigError

Ticks = NDArray[np.float64]
Duration = Callable[[np.random.Generator, int, int, int], Ticks]


@dataclass(frozen=True)
class Constant:
    """Always ``ticks``."""

    ticks: float

    def __post_init__(self) -> None:
        if not 0 <= self.ticks < float("inf"):
            raise ConfigError(f"ticks={self.ticks}: expected a number of ticks, not negative")

    def __call__(self, rng: np.random.Generator, peer: int, count: int, nbytes: int) -> Ticks:
        """Draws (count,) in ticks."""
        return np.full(count, float(self.ticks))


@dataclass(frozen=True)
class UniformInts:
    """Whole ticks from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"low={self.low}, high={self.high}: expected 0 <= low <= high ticks")

    def __call__(self, rng: np.random.Generator, peer: int, count: int, nbytes: int) -> Ticks:
        """Draws (count,) in ticks."""
        return rng.integers(self.low, self.high + 1, count).astype(np.float64)


@dataclass(frozen=True)
class LognormalTicks:
    """Lognormal with the given ``median`` in ticks and standard deviation ``sigma`` of its logarithm."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not (self.median > 0 and self.sigma >= 0):
            raise ConfigError(f"median={self.median}, sigma={self.sigma}: expected median > 0 and sigma >= 0")

    def __call__(self, rng: np.random.Generator, peer: int, count: int, nbytes: int) -> Ticks:
        """Draws (count,) in ticks."""
        return self.median * np.exp(self.sigma * rng.standard_normal(count))


@dataclass(frozen=True)
class Link:
    """``overhead`` ticks and one more for every ``bytes_per_tick`` of the message."""

    overhead: float
    bytes_per_tick: float

    def __post_init__(self) -> None:
        if not (self.overhead >= 0 and self.bytes_per_tick > 0):
            raise ConfigError(
                f"overhead={self.overhead}, bytes_per_tick={self.bytes_per_tick}: expected overhead >= 0 and "
                "bytes_per_tick > 0"
            )

    def __call__(self, rng: np.random.Generator, peer: int, count: int, nbytes: int) -> Ticks:
        """Draws (count,) in ticks."""
        return np.full(count, self.overhead + nbytes / self.bytes_per_tick)


@dataclass(frozen=True)
class Profile:
    """Each peer its own constant, from a text file with one number of ticks a line: line i + 1 is peer i's."""

    path: str
    ticks: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        try:
            values = tuple(map(float, read_text(Path(self.path)).split()))
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"{self.path}: expected a text file with one number of ticks a line ({e})"
            ) from None
        object.__setattr__(self, "ticks", values)

    def __call__(self, rng: np.random.Generator, peer: int, count: int, nbytes: int) -> Ticks:
        """Draws (count,) in ticks."""
        if peer >= len(self.ticks):
            raise ConfigError(
                f"{self.path}: holds {len(self.ticks)} numbers; peer {peer} needs a line of its own"
            )
        return np.full(count, self.ticks[peer])


def duration(key: str, value: object) -> Duration:
    """A duration from its short form: a number of ticks, or whole ticks from ``low-high`` (text or a pair)."""
    if callable(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Constant(value)
    if isinstance(value, str) and re.fullmatch(r"\d+-\d+", value):
        value = [int(v) for v in value.split("-")]
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return UniformInts(*value)
    raise ConfigError(
        f"strategy.{key}={value}: expected a number of ticks, low-high in whole ticks, or a _target_ from "
        "fedsim.topology.timing (LognormalTicks, Link, Profile)"
    )
