"""Codecs that send every entry in a few bits: QSGD (Alistarh et al. 2017) and sign with one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from fedsim.exchange.codecs.framing import HEADER, LARGEST, NAMES, FrameHeader, float32_bytes, read_float32

NORMS = ("max", "l2")
Codes = NDArray[np.int64]


def level_bits(s: int) -> int:
    """Bits of a code in 0..2s: ceil(log2(2s + 1))."""
    return (2 * s).bit_length()


def bucket_norms(v: ArrayLike, norm: str = "max", bucket: int = 512) -> NDArray[np.float32]:
    """A norm per bucket of ``v`` (d,), max|v| or |v|_2, rounded up to float32; ``bucket`` 0: the whole vector."""
    exact = _exact_norms(np.abs(np.asarray(v, dtype=np.float64)), norm, bucket)
    if not exact.max() <= LARGEST:
        raise ClientError(f"a norm of {exact.max():.3g} is too large for a float32")
    near = exact.astype(np.float32)
    return np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near).astype(np.float32)


def qsgd(
    v: ArrayLike, u: ArrayLike, s: int, norm: str = "max", bucket: int = 512
) -> tuple[Codes, NDArray[np.float32]]:
    """Codes (d,) in 0..2s and norms n of QSGD: l_i = min(s, floor(|v_i| (s/n) + u_i)), code = sign(v_i) l_i + s.

    ``u`` (d,): uniform draws in [0, 1). A bucket of zeros has codes s alone. Unbiased: E decoded = v.
    """
    vector = np.asarray(v, dtype=np.float64)
    norms = bucket_norms(vector, norm, bucket)
    n = _spread(norms, len(vector), bucket)
    per = np.divide(s, n, out=np.zeros_like(n), where=n > 0)
    levels = np.minimum(s, np.floor(np.abs(vector) * per + np.asarray(u)))
    levels[n == 0] = 0
    return (np.sign(vector) * levels).astype(np.int64) + s, norms


def qsgd_decoded(codes: ArrayLike, norms: ArrayLike, s: int, bucket: int = 512) -> Vector:
    """(code - s) n / s."""
    codes = np.asarray(codes)
    return (codes.astype(np.float64) - s) * _spread(np.asarray(norms), len(codes), bucket) / s


def qsgd_variance(v: ArrayLike, s: int, norm: str = "max", bucket: int = 512) -> float:
    """E |Q - v|^2 over the draws: the sum of (n/s)^2 p (1 - p), p the chance to be rounded up, n not yet rounded."""
    size = np.abs(np.asarray(v, dtype=np.float64))
    n = _spread(_exact_norms(size, norm, bucket), len(size), bucket)
    level = np.divide(size * s, n, out=np.zeros_like(n), where=n > 0)
    p = level - np.floor(level)
    return float(np.sum((n / s) ** 2 * p * (1 - p)))


def sign(v: ArrayLike) -> tuple[Codes, np.float32]:
    """Bits (d,), 1 where negative, and the scale mean|v| as float32; zero counts as positive."""
    vector = np.asarray(v, dtype=np.float64)
    return (vector < 0).astype(np.int64), np.float32(np.abs(vector).mean())


def sign_decoded(bits: ArrayLike, scale: float) -> Vector:
    """+ scale, or - scale where the bit is 1."""
    return float(scale) * (1.0 - 2.0 * np.asarray(bits, dtype=np.float64))


@dataclass(frozen=True)
class QSGD(FrameCodec):
    """Every entry on one of 2s + 1 levels of its bucket, rounded at random without bias; norms, then codes."""

    s: int = 7
    norm: str = "max"  # max | l2 (the paper)
    bucket: int = 512  # entries that share a norm, a power of two; 0: the whole vector
    id: ClassVar[int] = NAMES.index("qsgd")
    unbiased: ClassVar[bool] = True
    lengthens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.s >= 1 or 2 * self.s + 1 > 256:
            raise ArgumentError(
                f"compression.levels={self.s}: must be within 1..127, so that a code fits a byte"
            )
        if self.norm not in NORMS:
            raise ArgumentError(f"compression.norm={self.norm}: must be one of {', '.join(NORMS)}")
        if self.bucket and (self.bucket < 2 or self.bucket & (self.bucket - 1) or self.bucket >= 1 << 32):
            raise ArgumentError(
                f"compression.bucket={self.bucket}: must be a power of two from 2 on, or 0 for the whole vector"
            )

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + 4 * self._buckets(d) + stream_bytes(d, level_bits(self.s))

    def encode(self, v: ArrayLike, draws: CodecDraws, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        codes, norms = qsgd(vector, draws.uniforms(len(vector)), self.s, self.norm, self.bucket)
        head = FrameHeader(self.id, level_bits(self.s), len(vector), bucket=self.bucket)
        return head.pack() + float32_bytes(norms) + pack_bits(codes, head.bits)

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_header(head, FrameHeader(self.id, level_bits(self.s), head.d, bucket=self.bucket))
        check_length(body, self.size(head.d) - HEADER)
        count = self._buckets(head.d)
        norms, codes = _lengths(body, count), _codes(body[4 * count :], head.d, head.bits)
        if codes.max() > 2 * self.s:
            raise ClientError(f"a frame holds the code {codes.max()}; expected 0..{2 * self.s}")
        return qsgd_decoded(codes, norms, self.s, self.bucket)

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(0, 4 * self._buckets(head.d))]

    def _buckets(self, d: int) -> int:
        return -(-d // self.bucket) if self.bucket else 1


@dataclass(frozen=True)
class Sign(FrameCodec):
    """One bit an entry and one scale, mean|v|. Biased: goes with error feedback."""

    id: ClassVar[int] = NAMES.index("sign")
    shrinks: ClassVar[bool] = True

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + 4 + stream_bytes(d, 1)

    def encode(self, v: ArrayLike, draws: CodecDraws | None = None, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        bits, scale = sign(vector)
        return (
            FrameHeader(self.id, 1, len(vector)).pack()
            + float32_bytes(np.array([scale]))
            + pack_bits(bits, 1)
        )

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_header(head, FrameHeader(self.id, 1, head.d))
        check_length(body, self.size(head.d) - HEADER)
        return sign_decoded(_codes(body[4:], head.d, 1), _lengths(body, 1)[0])

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(0, 4)]


def _exact_norms(size: Vector, norm: str, bucket: int) -> Vector:
    starts = np.arange(0, len(size), bucket or len(size))
    if norm == "max":
        return np.asarray(np.maximum.reduceat(size, starts))
    return np.sqrt(np.add.reduceat(size * size, starts))


def _spread(norms: NDArray[Any], d: int, bucket: int) -> Vector:
    """The norm of each entry's bucket, (d,)."""
    return np.repeat(norms.astype(np.float64), bucket or d)[:d]


def _lengths(body: bytes, count: int) -> Vector:
    found = read_float32(body, count)
    if (found < 0).any():
        raise ClientError("a frame holds a negative norm or scale")
    return found


def _codes(stream: bytes, count: int, bits: int) -> Codes:
    try:
        return unpack_bits(stream, count, bits).astype(np.int64)
    except ArgumentError as error:
        raise ClientError(f"codes in a frame: {error}") from None
