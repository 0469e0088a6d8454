"""Where the noise of differential privacy comes from: keyed, so that a run repeats, or from the operating system."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsim.rng import torch_rng

Draws = Callable[[str], torch.Generator]  # by stage of the release
Normals = Callable[[int], Tensor]  # so many standard normal numbers, float64
BLOCK = 16  # numbers that torch makes normal together


def keyed(seed: int, purpose: str, *numbers: int) -> Normals:
    """Numbers that a key gives: the same again for whoever knows the seed, who can take them off again."""
    return of(torch_rng(seed, purpose, *numbers))


def of(generator: torch.Generator) -> Normals:
    """The generator's next numbers: those of ``torch.randn``, to its last bits, in half of its time."""

    def numbers(n: int) -> Tensor:
        if n < BLOCK:
            return torch.randn(n, generator=generator, dtype=torch.float64)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        whole, rest = uniform[: n - n % BLOCK], n % BLOCK
        _in_pairs(whole)
        if rest:  # torch draws the last block anew
            uniform[-BLOCK:] = torch.rand(BLOCK, generator=generator, dtype=torch.float64)
            _in_pairs(uniform[-BLOCK:])
        return uniform

    return numbers


def _in_pairs(u: Tensor) -> None:
    """Uniform numbers ``u`` (n,), n a multiple of 16, to normal ones, in place: the halves of each block in pairs (Box
    and Muller), many at a time."""
    first, second = u.view(-1, 2, BLOCK // 2).unbind(1)
    radius = (1 - first).log_().mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    torch.mul(radius, angle.cos(), out=first)
    torch.mul(radius, angle.sin_(), out=second)


def secret_rng() -> np.random.Generator:
    """A generator that begins at 32 bytes of the operating system's (Philox: 16 of its key, 16 of its counter)."""
    word = int.from_bytes(secrets.token_bytes(16), "little")
    start = int.from_bytes(secrets.token_bytes(16), "little")
    return np.random.Generator(np.random.Philox(key=word, counter=start))


def secret(n: int) -> Tensor:
    """``n`` standard normal numbers, float64, that nobody can draw again."""
    return torch.from_numpy(secret_rng().standard_normal(n))
