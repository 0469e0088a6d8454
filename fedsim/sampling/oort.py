"""Sampling by utility: high loss, in time (after Oort, Lai et al. 2021)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.sampling.population import Population
from fedsim.sampling.rules import Sampler, check


@dataclass(frozen=True, kw_only=True)
class Oort(Sampler):
    """Exploit clients of high utility, explore new ones. After Lai et al., OSDI 2021, Algorithm 1.

    Utility of client i: ``n_i loss_i``, clipped at the ``clip`` quantile, plus ``sqrt(0.1 ln R / R_i)`` of the
    clipped range (R_i: round of its last answer), times ``(T / t_i) ** penalty`` where its last answer took ``t_i > T``
    virtual seconds, T being the ``duration`` quantile. A share ``explore * decay ** round``, at least ``least``, of the
    cohort are new clients. Departures: the loss is the mean over the local steps, not the root mean square over
    samples; T is a quantile without a pacer; new clients are drawn uniformly; nobody is blacklisted.
    """

    explore: float
    decay: float
    least: float
    penalty: float
    duration: float
    clip: float
    cutoff: float
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("explore", "decay", "least", "duration", "clip", "cutoff"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        check(self.penalty >= 0, "penalty", self.penalty, "must not be negative")

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """Known clients by utility, the rest new; where either kind is short, the other fills in."""
        share = max(self.explore * self.decay ** key[0], self.least)
        known = np.fromiter(population.seen, dtype=np.int64, count=len(population.seen))
        known = known[population.present(known)]
        known = known[[c not in exclude for c in known.tolist()]] if len(known) else known
        fresh = sum(rng.random(count) < share)
        old = self._exploit(population, known, count - fresh, key[0], rng)
        taken = {*exclude, *population.seen}
        out = old + population.pick(population.uniform(rng, count), count - len(old), taken)
        if len(out) < count:
            spare = known[~np.isin(known, old)]
            out += self._exploit(population, spare, count - len(out), key[0], rng)
        return out

    def _exploit(
        self, population: Population, known: np.ndarray, count: int, round: int, rng: np.random.Generator
    ) -> list[int]:
        """Draw among those whose utility is at least ``cutoff`` of the last one that would make it."""
        if not len(known) or count <= 0:
            return []
        loss, seconds, last = np.array([population.seen[c] for c in known.tolist()]).T
        utility = population.sizes[known] * loss
        utility = np.minimum(utility, np.quantile(utility, self.clip))
        span = float(np.ptp(utility)) or 1.0
        utility = utility + span * np.sqrt(0.1 * np.log(round + 1) / (last + 1))
        limit = np.quantile(seconds, self.duration)
        utility[seconds > limit] *= (limit / seconds[seconds > limit]) ** self.penalty
        count = min(count, len(known))
        border = self.cutoff * np.sort(utility)[-count]
        good = np.flatnonzero(utility >= border)
        order = np.argsort(rng.exponential(size=len(good)) / np.maximum(utility[good], 1e-12))
        return [int(c) for c in known[good[order[:count]]]]
