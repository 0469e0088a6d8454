"""Randomness as an argument: every draw comes from a key, never from a global generator.

A key is (seed, purpose, integers such as round and client). It is hashed to 64 bits, so streams of different purposes
are independent and no generator has to be saved in a checkpoint.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, purpose: str, *numbers: int) -> int:
    """64-bit key of (seed, purpose, numbers); the same on every machine and Python version."""
    text = "/".join([str(int(seed)), purpose, *(str(int(n)) for n in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def numpy_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """NumPy generator (Philox) of a key: server-side draws, partitions, cohorts."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def torch_rng(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """CPU torch generator of a key: batch order, augmentation, noise."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers) >> 1)
