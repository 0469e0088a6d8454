"""Who is asked to take part: sampling rules, one class each. Cost follows the number asked, not the population.

A rule is called with the population, how many to ask, and the numbers that key its draws; it returns ids, ascending.
Fewer come back where fewer are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from fedsim.errors import ConfigError, check_setting
from fedsim.rng import numpy_rng
from fedsim.sampling.population import BLOCK, Population

check = partial(check_setting, "sampling")  # refuses an impossible option of a sampling rule
# Client ids to the current model's "loss" and "loss_rms" on each one's training samples, of those that answer
Measure = Callable[[Sequence[int]], Mapping[int, Mapping[str, Any]]]


class Sampler:
    """Base of the rules."""

    remembers: ClassVar[bool] = False  # whether it looks at what clients did before
    by_time: ClassVar[bool] = False  # whether it looks at how long clients take or will stay

    def refuse(self, *, devices: bool, asynchronous: bool) -> None:
        """Refuse a run without ``devices``, or an ``asynchronous`` one, if the rule cannot work there."""

    @property
    def wants_squares(self) -> bool:
        """Whether the losses it looks at are to be root mean squares over a client's samples."""
        return False

    def __call__(
        self,
        population: Population,
        count: int,
        *key: int,
        exclude: Collection[int] = (),
        measure: Measure | None = None,
    ) -> list[int]:
        """Ids to ask, ascending."""
        rng = numpy_rng(population.seed, "cohort", *key)
        return sorted(self.choose(population, count, rng, key, exclude, measure))

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
        measure: Measure | None = None,
    ) -> list[int]:
        """Up to ``count`` ids outside ``exclude``; ``measure`` gives losses of candidates, where that is possible."""
        raise NotImplementedError(
            f"{type(self).__name__} must define choose(population, count, rng, key, exclude, measure)"
        )


class Uniform(Sampler):
    """Uniformly without replacement, or each client independently (``participation=bernoulli``)."""

    def __call__(
        self,
        population: Population,
        count: int,
        *key: int,
        exclude: Collection[int] = (),
        measure: Measure | None = None,
    ) -> list[int]:
        """Where everybody can be asked, the cohorts of ``fedsim.sampling.cohort.sample``."""
        bernoulli = population.participation == "bernoulli"
        if population.blind and not exclude and len(key) == 1:
            drawn = population.draw(key[0], count)
            return population.there(drawn, *key) if population.absent else drawn
        if bernoulli:
            asked = population.draw(key[0], count)
            ids = np.array(asked, dtype=np.int64)
            found = [c for c in ids[population.present(ids)].tolist() if c not in exclude]
            return population.there(found, *key) if population.absent else found
        return super().__call__(population, count, *key, exclude=exclude, measure=measure)

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
        measure: Measure | None = None,
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
        measure: Measure | None = None,
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
        measure: Measure | None = None,
    ) -> list[int]:
        """Starts where the round before would have ended, had everybody been there."""
        m = len(population.sizes)
        first, block = key[-1] * count % m, max(count, BLOCK)
        blocks = ((first + np.arange(a, min(a + block, m))) % m for a in range(0, m, block))
        return population.pick(blocks, count, exclude)


@dataclass(frozen=True, kw_only=True)
class Staying(Sampler):
    """Of ``choice`` times as many present clients as needed, drawn uniformly, those that will stay longest."""

    by_time: ClassVar[bool] = True
    choice: float

    def __post_init__(self) -> None:
        check(self.choice >= 1, "choice", self.choice, "must be at least 1")

    def refuse(self, *, devices: bool, asynchronous: bool) -> None:
        """It looks at when clients leave."""
        if not devices:
            raise ConfigError(
                "sampling=staying: needs devices that come and go; add system=phones or another system"
            )

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
        measure: Measure | None = None,
    ) -> list[int]:
        """Ties, as where nobody ever leaves, go to who was drawn first."""
        clock = population.clock
        assert clock is not None, "see refuse"
        wish = round(self.choice * count)
        ids = np.array(population.pick(population.uniform(rng, wish), wish, exclude), dtype=np.int64)
        order = np.argsort(-clock.presence.until(ids, clock.now), kind="stable")
        return [int(c) for c in ids[order[:count]]]


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(Sampler):
    """Of d = ``choice`` times as many candidates as needed, drawn by size, those with the highest loss.

    Cho, Wang, Joshi: Towards Understanding Biased Client Selection in Federated Learning, AISTATS 2022, section 4.
    ``loss``: ``current`` (pi_pow-d) sends the model to the candidates, who measure it on all their samples, at the
    price of that exchange in bytes and virtual time; who does not answer is not chosen. ``last`` (pi_rpow-d) takes each
    client's last reported training loss (infinite before its first) and sends nothing for it. The paper averages the
    chosen clients uniformly.
    """

    choice: float
    loss: str
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.loss in ("current", "last"), "loss", self.loss, "choose current or last")
        check(self.choice >= 1, "choice", self.choice, "must be at least 1")

    def refuse(self, *, devices: bool, asynchronous: bool) -> None:
        """With ``loss=current`` candidates are measured at the start of a round."""
        if asynchronous and self.loss == "current":
            raise ConfigError(
                "sampling=power_of_choice: an asynchronous method has no moment at which candidates could be measured; "
                "choose sampling.loss=last"
            )

    def choose(
        self,
        population: Population,
        count: int,
        rng: np.random.Generator,
        key: tuple[int, ...],
        exclude: Collection[int],
        measure: Measure | None = None,
    ) -> list[int]:
        """Highest loss first; ties go to who was drawn first."""
        wish = round(self.choice * count)
        ids = population.pick(population.by_size(rng, wish), wish, exclude)
        if self.loss == "last":
            return sorted(ids, key=lambda c: -population.seen[c].loss if c in population.seen else -math.inf)[
                :count
            ]
        assert measure is not None, "see refuse"
        found = measure(ids) if ids else {}
        return sorted((c for c in ids if c in found), key=lambda c: -found[c]["loss"])[:count]
