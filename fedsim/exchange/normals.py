"""Where the noise of differential privacy comes from: keyed, so that a run repeats, or from the operating system."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsim.rng import torch_rng

Draws = Callable[[str], torch.Generator]  # by stage of the release
Normals = Callable[[int], Tensor]  # so many standard normal numbers, float64


def keyed(seed: int, purpose: str, *numbers: int) -> Normals:
    """Numbers that a key gives: the same again for whoever knows the seed, who can take them off again."""
    return of(torch_rng(seed, purpose, *numbers))


def of(generator: torch.Generator) -> Normals:
    """The generator's next numbers."""
    return lambda n: torch.randn(n, generator=generator, dtype=torch.float64)


def secret_rng() -> np.random.Generator:
    """A generator that begins at 32 bytes of the operating system's (Philox: 16 of its key, 16 of its counter)."""
    word = int.from_bytes(secrets.token_bytes(16), "little")
    start = int.from_bytes(secrets.token_bytes(16), "little")
    return np.random.Generator(np.random.Philox(key=word, counter=start))


def secret(n: int) -> Tensor:
    """``n`` standard normal numbers, float64, that nobody can draw again."""
    return torch.from_numpy(secret_rng().standard_normal(n))
