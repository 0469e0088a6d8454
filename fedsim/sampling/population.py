"""The registered clients as sampling rules see them: who is there, how large, and what they were seen to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.payload import Outcome

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
