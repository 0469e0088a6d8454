"""Sampling by utility: high loss, in time. Lai, Zhu, Madhyastha, Chowdhury: Oort: Efficient Federated Learning via
Guided Participant Selection, OSDI 2021 (Algorithm 1, sections 4.2 to 4.4)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np

from fedsim.sampling.population import Population
from fedsim.sampling.rules import Measure, Sampler, check


@dataclass(frozen=True, kw_only=True)
class Oort(Sampler):
    """Exploit clients of high utility, explore fast new ones.

    Statistical utility of client i, from its last answer: ``U_i = n_i sqrt(mean of its samples' squared losses)``,
    clipped at the ``clip`` quantile and scaled to [0, 1] (as the authors' code does; unscaled, what follows would not
    count). Utility: ``(U_i + sqrt(0.1 ln R / L_i)) (T / t_i)^penalty``, L_i the round of that answer, the last factor
    only where it took ``t_i > T`` virtual seconds. A share ``explore * decay ** round``, at least ``least``, of the
    cohort are new clients, drawn by the speed of their devices.

    The preferred duration T is ``preferred`` seconds (the paper's), or where that is ``None`` the ``duration`` quantile
    of the durations seen (the authors' code). The pacer relaxes it: whenever ``window`` rounds achieved less utility
    than the ``window`` rounds before, T grows by ``preferred``, or the quantile by ``pace``.

    ``loss``: ``samples`` measures the squares on the model that the round started from, which a real client would know
    from its training; ``steps`` takes the mean loss of the local steps instead, which costs no further pass. Clients
    that answered more than ``most`` times are only asked where nobody else is left. Cost follows the clients that have
    answered so far: new ones are drawn from ``choice`` times as many candidates, not from all.
    """

    explore: float
    decay: float
    least: float
    penalty: float
    preferred: float | None
    duration: float
    pace: float
    window: int
    clip: float
    cutoff: float
    most: int | None
    choice: float
    loss: str
    remembers: ClassVar[bool] = True
    by_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("explore", "decay", "least", "duration", "pace", "clip", "cutoff"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        check(self.penalty >= 0, "penalty", self.penalty, "must not be negative")
        check(self.window >= 1, "window", self.window, "must be at least 1 round")
        check(self.choice >= 1, "choice", self.choice, "must be at least 1")
        check(self.most is None or self.most >= 1, "most", self.most, "must be at least 1, or null")
        check(self.loss in ("samples", "steps"), "loss", self.loss, "choose samples or steps")
        positive = self.preferred is None or self.preferred > 0
        check(positive, "preferred", self.preferred, "must be positive, in seconds of virtual time, or null")

    @property
    def wants_squares(self) -> bool:
        """Under ``loss=samples``."""
        return self.loss == "samples"

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
        measure: Measure | None = None,
    ) -> list[int]:
        """Known clients by utility, the rest new; where either kind is short, the other fills in."""
        share = max(self.explore * self.decay ** key[0], self.least)
        known = np.fromiter(population.seen, dtype=np.int64, count=len(population.seen))
        known = known[population.present(known)]
        known = known[~np.isin(known, np.fromiter(exclude, dtype=np.int64, count=len(exclude)))]
        exhausted = np.zeros(len(known), dtype=bool)
        if self.most is not None:
            exhausted = _facts(population, known)[3] > self.most
        old = self._exploit(population, known[~exhausted], _rounded(count * (1 - share), rng), key[0], rng)
        out = old + self._explore(population, count - len(old), rng, exclude)
        for spare in (known[~exhausted], known[exhausted]):
            if len(out) < count:
                rest = spare[~np.isin(spare, out)]
                out += self._exploit(population, rest, count - len(out), key[0], rng)
        return out

    def _explore(
        self, population: Population, count: int, rng: np.random.Generator, exclude: Collection[int]
    ) -> list[int]:
        """New clients, by speed where devices have one."""
        wish = round(self.choice * count)
        taken = {*exclude, *population.seen}
        ids = np.array(population.pick(population.uniform(rng, wish), wish, taken), dtype=np.int64)
        if population.clock is None or not len(ids):
            return [int(c) for c in ids[:count]]
        order = np.argsort(rng.exponential(size=len(ids)) / population.clock.fleet.speed[ids])
        return [int(c) for c in ids[order[:count]]]

    def _exploit(
        self, population: Population, known: np.ndarray, count: int, round: int, rng: np.random.Generator
    ) -> list[int]:
        """Draw by utility among those whose own is at least ``cutoff`` of the last one that would make it."""
        if not len(known) or count <= 0:
            return []
        loss, seconds, last, _ = _facts(population, known)
        utility = population.sizes[known] * loss
        utility = np.minimum(utility, np.quantile(utility, self.clip))
        utility = (utility - utility.min()) / (float(np.ptp(utility)) or 1.0)
        utility = utility + np.sqrt(0.1 * np.log(round + 1) / (last + 1))
        limit = self.limit(seconds, population.achieved)
        utility[seconds > limit] *= (limit / seconds[seconds > limit]) ** self.penalty
        count = min(count, len(known))
        border = self.cutoff * np.sort(utility)[-count]
        good = np.flatnonzero(utility >= border)
        order = np.argsort(rng.exponential(size=len(good)) / np.maximum(utility[good], 1e-12))
        return [int(c) for c in known[good[order[:count]]]]

    def limit(self, seconds: np.ndarray, achieved: list[float]) -> float:
        """The preferred duration T, after the pacer's steps: one each time that a window achieved less than its
        predecessor."""
        w = self.window
        sums = [sum(achieved[a : a + w]) for a in range(0, len(achieved) - w + 1, w)]
        steps = sum(later < earlier for earlier, later in zip(sums, sums[1:], strict=False))
        if self.preferred is not None:
            return self.preferred * (1 + steps)
        return float(np.quantile(seconds, min(self.duration + self.pace * steps, 1.0)))


def _facts(population: Population, known: np.ndarray) -> np.ndarray:
    """What was seen of ``known`` (n,), as rows (4, n): the fields of ``Seen``."""
    flat = chain.from_iterable(population.seen[c] for c in known.tolist())
    return np.fromiter(flat, dtype=np.float64, count=4 * len(known)).reshape(-1, 4).T


def _rounded(value: float, rng: np.random.Generator) -> int:
    """A whole number whose mean is ``value``."""
    whole = int(value + 1e-9)
    return whole + bool(rng.random() < value - whole - 1e-9)
