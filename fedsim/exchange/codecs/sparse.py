"""Codecs that send a few entries: the largest (top_k), k drawn from a key (random_k), or those that are not zero.

Top-k is biased, |v - Q|^2 <= (1 - k/d) |v|^2, and needs error feedback (Stich et al. 2018; Karimireddy et al. 2019).
Random-k times d/k is unbiased; without the factor it is contractive and goes with feedback.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import ArgumentError, ClientError
from fedsim.exchange.codecs.bitstream import pack_bits, stream_bytes, unpack_bits
from fedsim.exchange.codecs.codec import (
    CodecDraws,
    FrameCodec,
    Shapes,
    Vector,
    as_vector,
    check_header,
    check_length,
)
from fedsim.exchange.codecs.framing import BITMAP, HEADER, NAMES, FrameHeader, float32_bytes, read_float32

SCALES = ("unbiased", "contractive")


def kept(d: int, rate: float) -> int:
    """k = max(1, ceil(rate d)): how many of ``d`` entries are sent."""
    return min(d, max(1, math.ceil(rate * d)))


def top_k(v: ArrayLike, k: int) -> NDArray[np.int64]:
    """Places of the ``k`` largest |v_i|, ascending; of equals the lower places."""
    size = np.abs(np.asarray(v, dtype=np.float64))
    if not 1 <= k <= len(size):
        raise ArgumentError(f"k={k}: must be within 1..{len(size)}, the entries of the vector")
    if k == len(size):
        return np.arange(k)
    least = np.partition(size, len(size) - k)[len(size) - k]
    above = np.flatnonzero(size > least)
    equal = np.flatnonzero(size == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def random_k(v: ArrayLike, places: ArrayLike, scale: str = "unbiased") -> Vector:
    """The vector (d,) with all entries zero but those at ``places`` (k,), times d/k if ``unbiased``."""
    vector, at = np.asarray(v, dtype=np.float64), np.asarray(places)
    out = np.zeros_like(vector)
    out[at] = vector[at] * (len(vector) / len(at) if scale == "unbiased" else 1.0)
    return out


def place_bits(d: int) -> int:
    """Bits of a place among ``d``: max(1, ceil(log2 d))."""
    return max(1, (d - 1).bit_length())


@dataclass(frozen=True)
class TopK(FrameCodec):
    """The k = max(1, ceil(rate d)) largest entries: places (or a bitmap, if shorter), then their float32 values."""

    rate: float = 0.01
    id: ClassVar[int] = NAMES.index("top_k")
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + _top_bytes(kept(d, self.rate), d)

    def encode(self, v: ArrayLike, draws: CodecDraws | None = None, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        places = top_k(vector, kept(len(vector), self.rate))
        return top_k_frame(len(vector), places, vector[places])

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_length(body, _top_bytes(kept(head.d, self.rate), head.d))
        places, values = read_top_k(head, body)
        out = np.zeros(head.d)
        out[places] = values
        return out

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(size - 4 * kept(head.d, self.rate), size)]


@dataclass(frozen=True)
class Nonzero(FrameCodec):
    """The entries that are not zero, as ``TopK`` sends its; of a vector of zeros its first entry. Nothing is lost but
    what a float32 cannot hold."""

    id: ClassVar[int] = NAMES.index("nonzero")
    unbiased: ClassVar[bool] = True

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of the shortest frame, header included."""
        return HEADER + _top_bytes(1, d)

    def encode(self, v: ArrayLike, draws: CodecDraws | None = None, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        places = np.flatnonzero(vector.astype("<f4"))
        places = places if len(places) else np.zeros(1, np.int64)
        return top_k_frame(len(vector), places, vector[places], self.id)

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        places, values = read_top_k(head, body, self.id)
        out = np.zeros(head.d)
        out[places] = values
        return out

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(size - 4 * _count(head, size), size)]


def top_k_frame(
    d: int, places: NDArray[np.int64], values: NDArray[np.float64], codec: int = TopK.id
) -> bytes:
    """The frame of a vector (d,) that is zero but for ``values`` (k,) at ``places`` (k,), ascending."""
    if _as_bitmap(len(places), d):
        bitmap = np.zeros(d, np.uint8)
        bitmap[places] = 1
        where, head = pack_bits(bitmap, 1), FrameHeader(codec, 1, d, BITMAP)
    else:
        bits = place_bits(d)
        where, head = pack_bits(places, bits), FrameHeader(codec, bits, d)
    return head.pack() + where + float32_bytes(values)


def read_top_k(head: FrameHeader, body: bytes, codec: int = TopK.id) -> tuple[NDArray[np.int64], Vector]:
    """Places (k,), ascending, and values (k,) of a body; k follows from its length.

    Raises:
        ClientError: if the body has an impossible length, or places that are not ascending or outside the vector.
    """
    d, size = head.d, len(body)
    bitmap, bits, k = bool(head.flags & BITMAP), place_bits(d), _count(head, size)
    if not 1 <= k <= d or size != _top_bytes(k, d):
        raise ClientError(f"a frame's body has {size} bytes, which no number of places among {d} takes")
    check_header(head, FrameHeader(codec, 1 if bitmap else bits, d, BITMAP if _as_bitmap(k, d) else 0))
    try:
        codes = unpack_bits(body[: -4 * k], d if bitmap else k, head.bits)
    except ArgumentError as error:
        raise ClientError(f"places in a frame: {error}") from None
    places = np.flatnonzero(codes) if bitmap else codes.astype(np.int64)
    if len(places) != k or places[-1] >= d or (np.diff(places) <= 0).any():
        raise ClientError(f"a frame's {len(places)} places are not {k} ascending ones below {d}")
    return places, read_float32(body[-4 * k :], k)


@dataclass(frozen=True)
class RandomK(FrameCodec):
    """k = max(1, ceil(rate d)) entries at places drawn from the key, which do not travel."""

    rate: float = 0.1
    scale: str = "unbiased"  # unbiased | contractive
    shared: bool = False  # type: ignore[misc]  # the same places for all clients of an exchange
    id: ClassVar[int] = NAMES.index("random_k")
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.scale not in SCALES:
            raise ArgumentError(f"compression.scale={self.scale}: must be one of {', '.join(SCALES)}")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """E Q = v, by the factor d/k."""
        return self.scale == "unbiased"

    @property
    def lengthens(self) -> bool:  # type: ignore[override]
        """What is unbiased lengthens."""
        return self.unbiased

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Where all clients send the same places, their sum is at these places."""
        return self.shared

    def support(self, d: int, draws: CodecDraws) -> NDArray[np.int64] | None:
        """The places of all clients."""
        return draws.places(d, kept(d, self.rate)) if self.shared else None

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + 4 * kept(d, self.rate)

    def encode(self, v: ArrayLike, draws: CodecDraws, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        places = draws.places(len(vector), kept(len(vector), self.rate))
        return FrameHeader(self.id, 32, len(vector)).pack() + float32_bytes(vector[places])

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        k, d = kept(head.d, self.rate), head.d
        check_header(head, FrameHeader(self.id, 32, d))
        check_length(body, 4 * k)
        out, places = np.zeros(d), draws.places(d, k)
        out[places] = read_float32(body, k)
        return random_k(out, places, self.scale)

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(0, size)]


def _top_bytes(k: int, d: int) -> int:
    return 4 * k + min(stream_bytes(k, place_bits(d)), stream_bytes(d, 1))


def _count(head: FrameHeader, size: int) -> int:
    """How many entries a body of ``size`` bytes holds."""
    if head.flags & BITMAP:
        return (size - stream_bytes(head.d, 1)) // 4
    return 8 * size // (32 + place_bits(head.d))


def _as_bitmap(k: int, d: int) -> bool:
    return stream_bytes(k, place_bits(d)) > stream_bytes(d, 1)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ArgumentError(f"compression.rate={rate}: must lie in (0, 1], the share of entries that is sent")
