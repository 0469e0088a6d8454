"""What the server's half of a release must know of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.exchange.accounting import Mechanism
from fedsim.task.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the server's half must know of a run."""

    seed: int
    layout: Layout
    dtype: torch.dtype
    cohort: float  # E
    stays: tuple[slice, ...] = ()  # spans of ``w`` that never leave clients
    mechanism: Mechanism | None = None
    keyed: bool = True
    deployed: bool = False  # clients are real: keyed noise protects nobody
    rounds: int = 0
    heaviest: float = 1.0  # most weight of a client in a mean
    affords: int | None = None  # releases, where they are worked out before the run
    apart: int = 0  # rounds between two turns of a client, at least
