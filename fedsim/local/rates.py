"""Schedules of the local learning rate: over the rounds of a run, and over a client's own steps of one round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fedsim.config.schema import ClientConfig
from fedsim.errors import ConfigError, check_choice, hint

READS: Mapping[str, tuple[str, ...]] = {  # shapes, and what each reads beside `warmup` and `over`
    "constant": (),
    "linear": ("floor",),
    "cosine": ("floor",),
    "step": ("every", "at", "gamma"),
}


@dataclass(frozen=True)
class RateSchedule:
    """What the learning rate is multiplied by at position t = 0, 1, ... of T (rounds, or local steps).

    While ``t < W``, the warm-up (``warmup``: so many positions, or below 1 a share of T): ``(t + 1) / (W + 1)``.
    Afterwards, with ``p = (t - W) / (T - W)`` and at most 1, ``linear`` gives ``1 - (1 - floor) p``, ``cosine``
    ``floor + (1 - floor) (1 + cos(pi p)) / 2``, ``constant`` 1. ``step`` multiplies by ``gamma`` at each position of
    ``at``, or at every ``every``-th. ``over`` is T where that is to be another than all rounds or all local steps.
    These are ``torch.optim.lr_scheduler``'s ``LinearLR``, ``CosineAnnealingLR``, ``StepLR`` and ``MultiStepLR``, with
    a ``LinearLR`` from ``1 / (W + 1)`` before them.
    """

    shape: str
    warmup: float = 0
    floor: float = 0
    every: int | None = None
    at: tuple[int, ...] = ()
    gamma: float = 0.1
    over: int | None = None

    @staticmethod
    def of(value: Any, key: str) -> RateSchedule | None:
        """The schedule that the setting ``key`` describes: a shape, or a mapping with ``shape`` and more.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        if value is None or isinstance(value, RateSchedule):
            return value
        given = {"shape": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or "shape" not in given:
            raise ConfigError(
                f"{key}={value}: must name a shape ({', '.join(READS)}), as in {key}=cosine or "
                f"'{key}={{shape: cosine, warmup: 5}}'"
            )
        shape, known = given["shape"], [f.name for f in fields(RateSchedule)]
        check_choice(f"{key}.shape", shape, READS)
        for name, one in given.items():
            if name not in known:
                raise ConfigError(f"unknown key '{key}.{name}'{hint(str(name), known, f'{key}.')}")
            if name not in ("shape", "warmup", "over", *READS[shape]):
                raise ConfigError(f"{key}.{name}={one}: {shape} does not read it; leave it out")
            _check(f"{key}.{name}", str(name), one)
        if shape == "step" and ("every" in given) == ("at" in given):
            raise ConfigError(f"{key}.shape=step: needs either {key}.every or {key}.at, where the rate falls")
        made: dict[str, Any] = {str(k): tuple(v) if k == "at" else v for k, v in given.items()}
        return RateSchedule(**made)

    @property
    def open(self) -> bool:
        """Whether it depends on how many rounds, or steps, there will be."""
        return self.over is None and (self.shape in ("linear", "cosine") or 0 < self.warmup < 1)

    @property
    def constant(self) -> bool:
        """Whether the factor is 1 throughout."""
        return self.shape == "constant" and not self.warmup

    def factor(self, t: int, horizon: int) -> float:
        """The factor at position ``t`` of ``horizon``; beyond it that of its end."""
        horizon = self.over or horizon
        warm = round(self.warmup * horizon) if self.warmup < 1 else int(self.warmup)
        rise = (t + 1) / (warm + 1) if t < warm else 1.0
        if self.shape == "step":
            return rise * float(
                self.gamma ** (t // self.every if self.every else sum(t >= m for m in self.at))
            )
        if t < warm or self.shape == "constant":
            return rise
        p = min(1.0, (t - warm) / (horizon - warm)) if horizon > warm else 1.0
        return 1 - (1 - self.floor) * (p if self.shape == "linear" else (1 - math.cos(math.pi * p)) / 2)


def prepared(local: ClientConfig, rounds: int) -> ClientConfig:
    """The settings with their schedules read, that over rounds made one of ``rounds``.

    Raises:
        ConfigError: for a schedule that cannot be.
    """
    over = RateSchedule.of(local.round_schedule, "client.round_schedule")
    if over is not None and over.open:
        over = replace(over, over=rounds)
    return replace(local, schedule=RateSchedule.of(local.schedule, "client.schedule"), round_schedule=over)


def round_factor(local: ClientConfig, round: int) -> float:
    """What the learning rate of round 0 is multiplied by in ``round``: ``lr_decay^round`` and ``round_schedule``."""
    decayed: float = local.lr_decay**round
    if local.round_schedule is None:
        return decayed
    schedule = RateSchedule.of(local.round_schedule, "client.round_schedule")
    assert schedule is not None
    if schedule.open:
        raise ConfigError("client.round_schedule: the number of rounds is not known here; give `over`")
    return decayed * schedule.factor(round, schedule.over or 1)


def round_lr(local: ClientConfig, round: int) -> float:
    """Local learning rate of ``round``, before what ``client.schedule`` makes of it from step to step."""
    return float(local.lr * round_factor(local, round))


def spans_rounds(value: Any) -> bool:
    """Whether ``client.round_schedule=value`` depends on the number of rounds; False for one that cannot be."""
    try:
        schedule = RateSchedule.of(value, "client.round_schedule")
    except (ConfigError, TypeError):
        return False  # it will be refused
    return schedule is not None and schedule.open


def _check(key: str, name: str, value: Any) -> None:
    """Refuse an impossible value of one entry of a schedule."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    whole = number and isinstance(value, int) and value >= 1
    if name in ("every", "over") and not whole:
        raise ConfigError(f"{key}={value}: must be a whole number, at least 1")
    if name == "at":
        listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        if not listed or any(type(v) is not int or v < 1 for v in value):
            raise ConfigError(f"{key}={value}: must be a list of whole numbers from 1, such as [30, 60]")
    if name == "warmup" and not (number and value >= 0 and (value < 1 or value == int(value))):
        raise ConfigError(f"{key}={value}: must be a whole number, or a share below 1 of all")
    if name == "floor" and not (number and 0 <= value <= 1):
        raise ConfigError(f"{key}={value}: must be in [0, 1], a share of the rate")
    if name == "gamma" and not (number and 0 < value <= 1):
        raise ConfigError(f"{key}={value}: must be in (0, 1]")
