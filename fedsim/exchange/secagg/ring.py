"""Fixed point: numbers as integers modulo R = 2^B, whose sum hangs on no order and cannot wrap.

L = floor((2^(B-1) - 1)/M) levels for at most M clients, step = reach/L, q = round(v/step) in [-L, L], residue q mod R.
A sum of at most M residues lies within M L < 2^(B-1), is read as signed, and times step is the sum of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import ArgumentError, ClientError, EngineError
from fedsim.exchange.codecs.bitstream import pack_bits, stream_bytes, unpack_bits
from fedsim.exchange.codecs.framing import HEADER, RING, FrameHeader

Residues = NDArray[np.uint64]
Levels = NDArray[np.int64]
ROUNDING = ("nearest", "stochastic")
FEWEST_BITS, MOST_BITS = 8, 62


class Quantised(NamedTuple):
    """A vector in fixed point: levels q (d,) in [-L, L], and how many entries lay beyond the reach."""

    q: Levels
    saturated: int


def ring_levels(B: int, M: int) -> int:
    """L = floor((2^(B-1) - 1)/M).

    Raises:
        ArgumentError: naming the smallest B, if there is no level.
    """
    if not FEWEST_BITS <= B <= MOST_BITS:
        raise ArgumentError(f"secagg.bits={B}: must be within {FEWEST_BITS}..{MOST_BITS}")
    if M < 1:
        raise ArgumentError(f"a ring for {M} clients: must be at least one")
    L = ((1 << (B - 1)) - 1) // M
    if L < 1:
        raise ArgumentError(
            f"secagg.bits={B}: too few for {M} clients; at least {M.bit_length() + 1} leave a level for each"
        )
    return L


def to_levels(v: ArrayLike, reach: ArrayLike, L: int, u: ArrayLike | None = None) -> Quantised:
    """q = round(v/step) in [-L, L], step = reach/L: ties to even, or floor(v/step + u) with draws ``u`` in [0, 1).

    ``reach``: one number, or one for each entry of ``v``. What lies beyond saturates and is counted.
    """
    step = np.asarray(reach, dtype=np.float64) / L
    scaled = np.asarray(v, dtype=np.float64) / step
    whole = np.rint(scaled) if u is None else np.floor(scaled + np.asarray(u))
    beyond = np.abs(whole) > L
    q = np.clip(np.clip(whole, -float(L), float(L)).astype(np.int64), -L, L)
    return Quantised(q, int(np.count_nonzero(beyond)))


def to_ring(v: ArrayLike, reach: ArrayLike, B: int, M: int, u: ArrayLike | None = None) -> Residues:
    """Residues (d,) q mod R of a vector; see :func:`to_levels`."""
    return residues_of(to_levels(v, reach, ring_levels(B, M), u).q, B)


def from_ring(residues: ArrayLike, reach: ArrayLike, B: int, M: int) -> NDArray[np.float64]:
    """The sum that residues (d,) stand for: read as signed, times step = reach/L."""
    step = np.asarray(reach, dtype=np.float64) / ring_levels(B, M)
    return np.asarray(signed(residues, B).astype(np.float64) * step)


def residues_of(q: ArrayLike, B: int) -> Residues:
    """q mod R, as unsigned numbers below R = 2^B."""
    return np.asarray(q).astype(np.int64).view(np.uint64) & _mask(B)


def signed(residues: ArrayLike, B: int) -> Levels:
    """Residues read as signed, in [-R/2, R/2)."""
    shift = np.uint64(64 - B)
    return (np.asarray(residues, np.uint64) << shift).view(np.int64) >> np.int64(64 - B)


def ring_sum(parts: Iterable[ArrayLike], B: int) -> Residues:
    """The sum mod R of residues (d,), in any order."""
    total: Residues | None = None
    for part in parts:
        array = np.asarray(part, np.uint64)
        total = array.copy() if total is None else total + array
    if total is None:
        raise ArgumentError("the sum of no residues: at least one client is needed")
    return total & _mask(B)


def ring_frame(residues: ArrayLike, B: int) -> bytes:
    """Residues (d,) as they travel: header of codec 7, then B bits each."""
    array = np.asarray(residues, np.uint64)
    return FrameHeader(RING, B, len(array)).pack() + pack_bits(array, B)


def ring_bytes(d: int, B: int) -> int:
    """Bytes of a frame of ``d`` residues."""
    return HEADER + stream_bytes(d, B)


def read_ring_frame(frame: bytes, d: int, B: int) -> Residues:
    """The inverse of :func:`ring_frame`.

    Raises:
        ClientError: if it is not of ``d`` residues of B bits.
    """
    head = FrameHeader.read(frame)
    if head != FrameHeader(RING, B, d) or len(frame) != ring_bytes(d, B):
        raise ClientError(f"a frame says {head} in {len(frame)} bytes; expected {d} residues of {B} bits")
    try:
        return unpack_bits(frame[HEADER:], d, B)
    except ArgumentError as error:
        raise ClientError(f"residues in a frame: {error}") from None


def rounding_growth(d: int, step: float, rounding: str = "nearest") -> float:
    """By how much rounding can lengthen a vector (d,): step sqrt(d)/2, stochastic step sqrt(d)."""
    return step * float(np.sqrt(d)) / (2 if rounding == "nearest" else 1)


@dataclass(frozen=True)
class FixedPoint:
    """The ring of a run: ``bits`` B, for at most ``most`` M clients a sum."""

    bits: int
    most: int
    rounding: str = "nearest"  # nearest (ties to even) | stochastic

    def __post_init__(self) -> None:
        ring_levels(self.bits, self.most)
        if self.rounding not in ROUNDING:
            raise ArgumentError(f"secagg.round={self.rounding}: must be one of {', '.join(ROUNDING)}")

    @property
    def L(self) -> int:  # noqa: N802 - the symbol of the equations
        """Levels on each side of zero."""
        return ring_levels(self.bits, self.most)

    def levels(self, v: ArrayLike, reach: ArrayLike, u: ArrayLike | None = None) -> Quantised:
        """q of a vector (d,); ``u`` where the rounding is stochastic."""
        return to_levels(v, reach, self.L, u)

    def check_cohort(self, clients: int) -> None:
        """Refuse a cohort that could make a sum wrap, before anything is sent.

        Raises:
            EngineError: if there are more than M.
        """
        if clients > self.most:
            raise EngineError(
                f"a sum of {clients} clients does not fit the ring, which was made for {self.most}; "
                f"type secagg.most={clients}, or ask fewer"
            )


def _mask(B: int) -> np.uint64:
    return np.uint64((1 << B) - 1)
