"""Standard normal numbers by address: row r of class c is the same whenever and with whatever else it is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STEP = np.uint64(
    0x9E3779B97F4A7C15
)  # SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class KeyedNoise:
    """Counter-based: ``noise(label, rows, width)`` are the first ``width`` numbers of the rows ``rows`` of a class.

    ``key`` is a 64-bit number such as ``fedsim.rng.key`` makes. Numbers come in pairs by Box and Muller's transform of
    two 32-bit uniforms, so none exceeds 6.7 in size.
    """

    key: int

    def __call__(self, label: int, rows: Tensor, width: int) -> Tensor:
        """``(len(rows), width)`` float32, for row numbers ``rows`` (k,) from 0."""
        place = rows.numpy().astype(np.uint64) + (np.uint64(label) << np.uint64(40))
        start = _mix(np.uint64(self.key) ^ _mix(place * _STEP))
        pairs = np.arange(1, -(-width // 2) + 1, dtype=np.uint64)
        bits = _mix(start[:, None] + pairs * _STEP)
        near, turn = (bits >> np.uint64(32)).astype(np.float32), bits.astype(np.uint32).astype(np.float32)
        radius = np.sqrt(np.float32(-2) * np.log((near + np.float32(0.5)) * np.float32(2**-32)))
        angle = turn * np.float32(2 * np.pi * 2**-32)
        out = np.empty((len(bits), 2 * len(pairs)), dtype=np.float32)
        out[:, 0::2], out[:, 1::2] = radius * np.cos(angle), radius * np.sin(angle)
        return torch.from_numpy(out)[:, :width]


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * _MIX[0]
        z = (z ^ (z >> np.uint64(27))) * _MIX[1]
        out: np.ndarray = z ^ (z >> np.uint64(31))
        return out
