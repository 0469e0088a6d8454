"""Secure aggregation: sums in fixed point, and masks that hide what each client added to them."""

from __future__ import annotations

from fedsim.exchange.secagg.masks import PRG, key_stream, masked, pair_key, unmasked
from fedsim.exchange.secagg.protocol import (
    LegBytes,
    MaskingClient,
    TooFewSurvivors,
    UnmaskingServer,
    default_threshold,
    neighbours,
    unfit,
)
from fedsim.exchange.secagg.ring import (
    FixedPoint,
    Quantised,
    from_ring,
    read_ring_frame,
    residues_of,
    ring_frame,
    ring_levels,
    ring_sum,
    signed,
    to_levels,
    to_ring,
)
from fedsim.exchange.secagg.shares import join, split

__all__ = [
    "PRG",
    "FixedPoint",
    "LegBytes",
    "MaskingClient",
    "Quantised",
    "TooFewSurvivors",
    "UnmaskingServer",
    "default_threshold",
    "from_ring",
    "join",
    "key_stream",
    "masked",
    "neighbours",
    "pair_key",
    "read_ring_frame",
    "residues_of",
    "ring_frame",
    "ring_levels",
    "ring_sum",
    "signed",
    "split",
    "to_levels",
    "to_ring",
    "unfit",
    "unmasked",
]
