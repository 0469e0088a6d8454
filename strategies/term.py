"""TERM. Li, Beirami, Sanjabi, Smith: Tilted Empirical Risk Minimization, ICLR 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.server.exchanges import Server
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.weighed import Answers, LossWeighted, shifted_powers


def term_weights(losses: Sequence[float] | Tensor, sizes: Sequence[float] | Tensor, t: float) -> Tensor:
    """``n_k exp(t F_k)`` (n,), float64, divided by their sum."""
    weights = _tilted([float(f) for f in losses], t)
    weights = weights * weights.new_tensor([float(n) for n in sizes])
    return weights / weights.sum()


def _tilted(losses: Sequence[float], t: float) -> Tensor:
    return shifted_powers([t * loss / math.log(2) for loss in losses])


@dataclass(kw_only=True)
class TERM(LossWeighted):
    """Clients weigh ``n_k exp(t F_k)``: ``t > 0`` lifts the worst, ``t < 0`` leaves outliers out, ``t = 0`` is FedAvg.

    ``weighting``: ``samples`` (n_k), or ``uniform`` without it.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        discloses="clients of TERM send their losses, which no noise covers; type strategy=fedavg",
    )
    t: float

    def __post_init__(self) -> None:
        check(math.isfinite(self.t), "t", self.t, "must be a number")
        super().__post_init__()

    @property
    def is_fedavg(self) -> bool:
        """``t = 0``."""
        return self.t == 0

    def weigh(self, server: Server, state: State, answers: Answers) -> Tensor:
        """The tilted weights, up to a common factor."""
        weights = _tilted(answers.losses, self.t)
        return weights * weights.new_tensor(answers.sizes)
