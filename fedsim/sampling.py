"""Who is asked to take part: sampling rules, one class each. Cost follows the number asked, not the population.

A rule is called with the population, how many to ask, and the numbers that key its draws; it returns ids, ascending.
Fewer come back where fewer are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import sample
from fedsim.errors import ConfigError
from fedsim.payload import Outcome
from fedsim.rng import numpy_rng

if TYPE_CHECKING:
    from fedsim.system.clock import Clock

BLOCK = 64  # candidates looked at together, at least


@dataclass
class Population:
    """The registered clients as a sampling rule sees them."""

    sizes: np.ndarray  # (m,) training samples
    seed: int
    clock: Clock | None = None
    participation: str = "fixed"
    seen: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # loss, virtual seconds, round

    @property
    def blind(self) -> bool:
        """Whether everybody can be asked: no devices, or the server does not know who is there."""
        return self.clock is None or not self.clock.system.check_in

    @cached_property
    def cumulative(self) -> np.ndarray:
        """Running sum (m,) of the numbers of samples."""
        return np.cumsum(self.sizes, dtype=np.float64)

    def present(self, ids: np.ndarray) -> np.ndarray:
        """Mask (n,) of those that can be asked now."""
        return np.ones(len(ids), dtype=bool) if self.clock is None or self.blind else self.clock.present(ids)

    def pick(self, blocks: Iterator[np.ndarray], count: int, exclude: Collection[int] = ()) -> list[int]:
        """The first ``count`` ids of ``blocks`` that can be asked."""
        out: list[int] = []
        for ids in blocks:
            out += [c for c in ids[self.present(ids)].tolist() if c not in exclude]
            if len(out) >= count:
                break
        return out[:count]

    def uniform(self, rng: np.random.Generator, block: int) -> Iterator[np.ndarray]:
        """All clients in random order, in blocks; drawn one by one until half of them have come."""
        m = len(self.sizes)
        return self._drawn(lambda n: rng.integers(m, size=n), rng, block)

    def by_size(self, rng: np.random.Generator, block: int) -> Iterator[np.ndarray]:
        """Clients with samples in random order, each next one with probability in proportion to its samples."""
        total = self.cumulative[-1]
        return self._drawn(
            lambda n: np.searchsorted(self.cumulative, rng.random(n) * total, side="right"),
            rng,
            block,
            self.sizes,
        )

    def _drawn(
        self,
        draw: Callable[[int], np.ndarray],
        rng: np.random.Generator,
        block: int,
        weights: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:
        came, block, m = set[int](), max(block, BLOCK), len(self.sizes)
        while 2 * len(came) < m and block <= 2 * m:
            fresh = [c for c in dict.fromkeys(draw(block).tolist()) if c not in came]
            came.update(fresh)
            yield np.array(fresh, dtype=np.int64)
            block *= 2
        rest = np.setdiff1d(np.arange(m), np.fromiter(came, dtype=np.int64, count=len(came)))
        if weights is None:
            yield rng.permutation(rest)
            return
        rest = rest[weights[rest] > 0]
        yield rest[np.argsort(rng.exponential(size=len(rest)) / weights[rest])]

    def observe(self, round: int, outcomes: Sequence[Outcome]) -> None:
        """Remember what the clients that answered were seen to do."""
        for o in outcomes:
            if o.kind == "ok" and "train_loss" in o.metrics:
                self.seen[o.client] = float(o.metrics["train_loss"]), o.sim_seconds or 0.0, float(round)

    def save(self) -> Tensor:
        """What was observed, ``(n, 4)`` float64: client, loss, seconds, round."""
        return torch.tensor([[c, *v] for c, v in self.seen.items()], dtype=torch.float64).reshape(-1, 4)

    def restore(self, saved: Tensor) -> None:
        """Go on from what ``save`` gave."""
        self.seen = {int(c): (loss, seconds, at) for c, loss, seconds, at in saved.tolist()}


class Sampler:
    """Base of the rules."""

    remembers: ClassVar[bool] = False  # whether it looks at what clients did before

    def __call__(
        self, population: Population, count: int, *key: int, exclude: Collection[int] = ()
    ) -> list[int]:
        """Ids to ask, ascending."""
        rng = numpy_rng(population.seed, "cohort", *key)
        return sorted(self.choose(population, count, rng, key, exclude))

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """Up to ``count`` ids outside ``exclude``."""
        raise NotImplementedError


class Uniform(Sampler):
    """Uniformly without replacement, or each client independently (``participation=bernoulli``)."""

    def __call__(
        self, population: Population, count: int, *key: int, exclude: Collection[int] = ()
    ) -> list[int]:
        """Where everybody can be asked, the cohorts of ``fedsim.cohort.sample``."""
        m, bernoulli = len(population.sizes), population.participation == "bernoulli"
        if population.blind and not exclude and len(key) == 1:
            return sample(population.seed, key[0], m, count, population.participation)
        if bernoulli:
            asked = sample(population.seed, key[0], m, count, population.participation)
            ids = np.array(asked, dtype=np.int64)
            return [c for c in ids[population.present(ids)].tolist() if c not in exclude]
        return super().__call__(population, count, *key, exclude=exclude)

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """The first of a random order."""
        return population.pick(population.uniform(rng, count), count, exclude)


class Weighted(Sampler):
    """Without replacement, with probability in proportion to the number of samples; clients without any never."""

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """The first of a random order by size."""
        return population.pick(population.by_size(rng, count), count, exclude)


class RoundRobin(Sampler):
    """One after another in the order of their ids; who is absent is passed over."""

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """Starts where the round before would have ended, had everybody been there."""
        m = len(population.sizes)
        first, block = key[-1] * count % m, max(count, BLOCK)
        blocks = ((first + np.arange(a, min(a + block, m))) % m for a in range(0, m, block))
        return population.pick(blocks, count, exclude)


@dataclass(frozen=True, kw_only=True)
class Staying(Sampler):
    """Of ``choice`` times as many present clients as needed, drawn uniformly, those that will stay longest."""

    choice: float

    def __post_init__(self) -> None:
        _check(self.choice >= 1, "choice", self.choice, "must be at least 1")

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """Ties, as where nobody ever leaves, go to who was drawn first."""
        clock = population.clock
        if clock is None:
            raise ConfigError(
                "sampling=staying: needs devices that come and go; add system=phones or another system"
            )
        wish = round(self.choice * count)
        ids = np.array(population.pick(population.uniform(rng, wish), wish, exclude), dtype=np.int64)
        order = np.argsort(-clock.presence.until(ids, clock.now), kind="stable")
        return [int(c) for c in ids[order[:count]]]


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(Sampler):
    """Of ``choice`` times as many candidates as needed, drawn by size, those with the highest loss.

    Cho, Wang, Joshi: Towards Understanding Biased Client Selection in Federated Learning, AISTATS 2022, section 4; the
    variant pi_rpow-d, which takes each client's last reported training loss (infinite before its first) and sends
    nothing for it.
    """

    choice: float
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.choice >= 1, "choice", self.choice, "must be at least 1")

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
    ) -> list[int]:
        """Highest loss first; ties go to who was drawn first."""
        wish = round(self.choice * count)
        ids = population.pick(population.by_size(rng, wish), wish, exclude)
        nothing = (float("inf"), 0.0, 0.0)
        return sorted(ids, key=lambda c: -population.seen.get(c, nothing)[0])[:count]


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
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        _check(self.penalty >= 0, "penalty", self.penalty, "must not be negative")

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


def _check(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"sampling.{key}={value}: {expected}")
