"""Attackers that see the honest updates and try out on the server's rule how far they can go.

Shejwalkar, Houmansadr: Manipulating the Byzantine, NDSS 2021; the line search as in Allouah, Farhadkhani, Guerraoui,
Gupta, Pinot, Stephan: Fixing by Mixing, AISTATS 2023, and in ByzFL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.attacks.base import check
from clients.attacks.omniscient import Colluding
from fedsim.errors import TooFewUpdates


@dataclass(frozen=True, kw_only=True)
class Optimised(Colluding):
    """Base: of a family of vectors with one factor, the one that carries the rule's result farthest from the mean of
    the honest updates, as found by ``line_search`` with these options."""

    evals: int
    start: float
    delta: float
    ratio: float

    def __post_init__(self) -> None:
        check(self.evals >= 1, "evals", self.evals, "must be at least 1")
        check(self.delta != 0, "delta", self.delta, "must not be 0")
        check(0.5 < self.ratio < 1, "ratio", self.ratio, "must be between 0.5 and 1")

    def vector(self, honest: Tensor, factor: float) -> Tensor:
        """What all attackers send (D,), given the ``honest`` updates (h, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define vector(honest, factor)")

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """Against the mean."""
        return self.collude_against(own, honest, lambda rows: rows.mean(0))

    def collude_against(self, own: Tensor, honest: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for all attackers. Where updates are too few for the rule, ``start`` is the factor."""
        rows, wanted = torch.cat([honest, own]), honest.mean(0)

        def moved(factor: float) -> float:
            rows[len(honest) :] = self.vector(honest, factor)
            try:
                return float(torch.linalg.vector_norm((rule(rows) - wanted).double()))
            except TooFewUpdates:
                return 0.0

        options = {"start": self.start, "delta": self.delta, "ratio": self.ratio}
        return self.vector(honest, line_search(moved, evals=self.evals, **options)).expand_as(own)


@dataclass(frozen=True, kw_only=True)
class OptimalALIE(Optimised):
    """``mu + factor sigma`` with the honest updates' mean and deviation (divisor h - 1) per coordinate.

    A negative ``delta`` searches on the side of ALIE's ``mu - z sigma``.
    """

    def vector(self, honest: Tensor, factor: float) -> Tensor:
        """See above."""
        sigma = honest.std(0) if len(honest) > 1 else torch.zeros_like(honest[0])
        return honest.mean(0) + factor * sigma


@dataclass(frozen=True, kw_only=True)
class OptimalIPM(Optimised):
    """``-factor mu`` with the mean of the honest updates."""

    def vector(self, honest: Tensor, factor: float) -> Tensor:
        """See above."""
        return -factor * honest.mean(0)


def line_search(
    measure: Callable[[float], float],
    *,
    evals: int = 20,
    start: float = 0.0,
    delta: float = 10.0,
    ratio: float = 0.8,
) -> float:
    """The factor with the greatest ``measure`` that ``evals`` evaluations find.

    From ``start`` in steps of ``delta``, doubled as long as the measure grows; from the best factor then in steps that
    shrink by ``ratio`` each time.
    """
    best, most = start, measure(start)
    growing = True
    for _ in range(evals - 1):
        found = measure(best + delta)
        better = found > most
        if better:
            best, most = best + delta, found
        growing = growing and better
        delta *= 2 if growing else ratio
    return best
