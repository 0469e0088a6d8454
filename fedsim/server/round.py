"""What a strategy may know about the round it is called for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim import rng
from fedsim.config.schema import ClientConfig
from fedsim.local.rates import round_lr


@dataclass(frozen=True)
class Round:
    """What a strategy may know about the round it is called for."""

    index: int  # from 0
    cohort: Sequence[int]  # client ids, ascending
    num_clients: int  # registered clients m
    seed: int
    local: ClientConfig
    wanted: int | None = None  # answers after which nobody else is waited for

    @property
    def lr(self) -> float:
        """Local learning rate of this round."""
        return round_lr(self.local, self.index)

    def rng(self, purpose: str) -> torch.Generator:
        """A generator keyed by (seed, purpose, round), for draws at the server."""
        return rng.torch_rng(self.seed, f"server/{purpose}", self.index)

    def numpy_rng(self, purpose: str) -> np.random.Generator:
        """The same as a NumPy generator."""
        return rng.numpy_rng(self.seed, f"server/{purpose}", self.index)
