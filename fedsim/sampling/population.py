"""The registered clients as sampling rules see them: who is there, how large, and what they were seen to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.exchange.payload import Outcome
from fedsim.rng import numpy_rng
from fedsim.sampling.cohort import sample

if TYPE_CHECKING:
    from fedsim.system.clock import Clock

BLOCK = 64  # candidates looked at together, at least


class Seen(NamedTuple):
    """What a client was last seen to do: its loss, virtual seconds, the round, and how often it has answered."""

    loss: float
    seconds: float
    round: float
    times: float


@dataclass
class Population:
    """The registered clients as a sampling rule sees them.

    Those who are ``absent`` are never asked. ``fill``: others take their places, the next ones of the same random
    order; else a cohort has fewer clients.
    """

    sizes: np.ndarray  # (m,) training samples, also of the absent
    seed: int
    clock: Clock | None = None
    participation: str = "fixed"
    seen: dict[int, Seen] = field(default_factory=dict)
    achieved: list[float] = field(
        default_factory=list
    )  # each round's sum of n_i loss_i over those that answered
    absent: frozenset[int] = frozenset()
    fill: bool = True
    empty: bool = False  # a bernoulli cohort may have nobody in it: a coin that is tossed again is no coin
    cap: int | None = None  # most clients of a bernoulli cohort
    secret: bool = False  # cohorts are drawn by the operating system, not by the seed

    def draw(self, round: int, count: int) -> list[int]:
        """The cohort of a round by ``participation``, whoever is there."""
        return sample(
            self.seed,
            round,
            len(self.sizes),
            count,
            self.participation,
            empty=self.empty,
            cap=self.cap,
            secret=self.secret,
        )

    @property
    def blind(self) -> bool:
        """Whether everybody can be asked: nobody is ever absent, or the server does not know who is there."""
        return self.clock is None or not self.clock.system.check_in or self.clock.everybody

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
        absent = self.absent
        for ids in blocks:
            out += [c for c in ids[self.present(ids)].tolist() if c not in exclude]
            if absent and self.fill:
                out = [c for c in out if c not in absent]
            if len(out) >= count:
                break
        return [c for c in out[:count] if c not in absent] if absent else out[:count]

    def there(self, cohort: Sequence[int], *key: int, exclude: Collection[int] = ()) -> list[int]:
        """``cohort``, drawn from all who are registered, without those who are absent.

        In their places, with ``fill``, the first of a random order keyed by (seed, ``cohort/substitute``, ``key``)
        that are neither in it nor absent. So nobody else's membership changes, and cost follows the cohort.
        """
        left = [c for c in cohort if c not in self.absent]
        if (missing := len(cohort) - len(left)) and self.fill and self.participation == "fixed":
            order = self.uniform(numpy_rng(self.seed, "cohort/substitute", *key), BLOCK)
            left += self.pick(order, missing, {*left, *exclude})
        return sorted(left)

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

    def observe(
        self, round: int, outcomes: Sequence[Outcome], losses: Mapping[int, float] | None = None
    ) -> None:
        """Remember what the clients that answered were seen to do; their loss from ``losses``, if given."""
        total = 0.0
        for o in outcomes:
            if o.kind == "ok" and "train_loss" in o.metrics:
                loss = float((losses or {}).get(o.client, o.metrics["train_loss"]))
                loss = loss if math.isfinite(loss) else 0.0  # it says nothing, and would be above all others'
                times = self.seen[o.client].times if o.client in self.seen else 0.0
                self.seen[o.client] = Seen(loss, o.sim_seconds or 0.0, float(round), times + 1)
                total += float(self.sizes[o.client]) * loss
        self.achieved.append(total)

    def save(self) -> Tensor:
        """What was observed, ``(n + r, 5)`` float64: client, loss, seconds, round, times; what r rounds achieved."""
        rows = [[c, *v] for c, v in self.seen.items()] + [[-1, v, 0, 0, 0] for v in self.achieved]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)

    def restore(self, saved: Tensor) -> None:
        """Go on from what ``save`` gave."""
        rows = saved.tolist()
        self.seen = {int(c): Seen(*rest) for c, *rest in rows if c >= 0}
        self.achieved = [rest[0] for c, *rest in rows if c < 0]
