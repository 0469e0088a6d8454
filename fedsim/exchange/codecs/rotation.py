"""A random rotation and a few bits an entry: DRIVE (Vargaftik et al. 2021) and EDEN (2022).

r = H D v / sqrt(n): v padded to n = 2^ceil(log2 d), D random signs from the key, H the Hadamard matrix. The entries of
r are then nearly normal, and each is sent as the nearest of 2^b centroids of N(0, 1).
"""

from __future__ import annotations

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
from fedsim.exchange.codecs.framing import HEADER, NAMES, FrameHeader, float32_bytes, read_float32

MODES = ("unbiased", "least")

# of N(0, 1) with 2^b levels, the positive half by b: fixed points of Lloyd's iteration
CENTROIDS = {
    1: (0.7978845608028654,),
    2: (0.45278003463649197, 1.510417608499095),
    3: (0.24509417894422184, 0.7560052812058781, 1.3439092785050006, 2.1519457045369874),
    4: (
        *(0.1283950298511473, 0.38804829949029135, 0.6567591185324653, 0.9423404564869625),
        *(1.256231197347178, 1.6180463860218819, 2.0690172265313844, 2.732589570995161),
    ),
}


def hadamard(x: ArrayLike) -> Vector:
    """H x of the Hadamard matrix in its natural order, entries +-1; x (n,) with n a power of two."""
    out = np.array(x, dtype=np.float64)
    n, half = len(out), 1
    if n & (n - 1) or not n:
        raise ArgumentError(f"a vector of {n} entries has no Hadamard transform; pad it to a power of two")
    while half < n:
        pairs = out.reshape(-1, 2, half)
        first, second = pairs[:, 0].copy(), pairs[:, 1]
        pairs[:, 0] += second
        np.subtract(first, second, out=pairs[:, 1])
        half *= 2
    return out


def rotated(v: ArrayLike, signs: ArrayLike) -> Vector:
    """r = H D v / sqrt(n), (n,), of v (d,) padded with zeros; ``signs`` (n,) the diagonal of D."""
    vector, D = np.asarray(v, dtype=np.float64), np.asarray(signs, dtype=np.float64)
    padded = np.zeros(len(D))
    padded[: len(vector)] = vector
    return np.asarray(hadamard(D * padded) / np.sqrt(len(D)))


def unrotated(r: ArrayLike, signs: ArrayLike, d: int) -> Vector:
    """The inverse of :func:`rotated`: the first ``d`` entries of D H r / sqrt(n)."""
    D = np.asarray(signs, dtype=np.float64)
    return np.asarray((D * hadamard(r) / np.sqrt(len(D)))[:d])


def rotation_codes(r: ArrayLike, b: int, mode: str = "unbiased") -> tuple[NDArray[np.int64], np.float32]:
    """Codes (n,) of r sqrt(n)/|r| by the nearest centroid, plus 2^(b-1) where negative, and the scale S (float32).

    S = |r|^2/<r, q> (``unbiased``) or <r, q>/|q|^2 (``least`` squares). A zero vector has codes and scale 0.
    """
    x = np.asarray(r, dtype=np.float64)
    square = float(np.sum(x * x))
    if square == 0:
        return np.zeros(len(x), np.int64), np.float32(0)
    centroids = np.array(CENTROIDS[b])
    size = np.abs(x) * (np.sqrt(len(x)) / np.sqrt(square))
    index = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, size)
    codes = index + np.where(x < 0, 1 << (b - 1), 0)
    q = centroid_values(codes, b)
    inner = float(np.sum(x * q))
    return codes, np.float32(square / inner if mode == "unbiased" else inner / float(np.sum(q * q)))


def centroid_values(codes: ArrayLike, b: int) -> Vector:
    """The centroid q that each code stands for."""
    c = np.array(CENTROIDS[b])
    return np.asarray(np.concatenate([c, -c])[np.asarray(codes)])


def rotation_decoded(codes: ArrayLike, scale: float, signs: ArrayLike, b: int, d: int) -> Vector:
    """D H^-1 (S q), its first ``d`` entries."""
    return unrotated(float(scale) * centroid_values(codes, b), signs, d)


@dataclass(frozen=True)
class Rotate(FrameCodec):
    """``bits`` 1..4 for each entry of the rotated vector, and one scale."""

    bits: int = 1
    mode: str = "unbiased"  # unbiased | least
    shared: bool = False  # type: ignore[misc]  # one rotation for all clients of an exchange
    id: ClassVar[int] = NAMES.index("rotate")

    def __post_init__(self) -> None:
        if self.bits not in CENTROIDS:
            raise ArgumentError(f"compression.bits={self.bits}: must be within 1..4")
        if self.mode not in MODES:
            raise ArgumentError(f"compression.mode={self.mode}: must be one of {', '.join(MODES)}")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Over the rotations, in the limit of many entries."""
        return self.mode == "unbiased"

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Where all clients rotate alike, their sum is rotated alike."""
        return self.shared

    def flat(self, v: ArrayLike, draws: CodecDraws) -> Vector | None:
        """r (n,), without codes."""
        vector = np.asarray(v, dtype=np.float64)
        return rotated(vector, draws.signs(padded_size(len(vector)))) if self.shared else None

    def unflat(self, r: ArrayLike, draws: CodecDraws, d: int) -> Vector:
        """See :func:`unrotated`."""
        return unrotated(r, draws.signs(padded_size(d)), d)

    def flat_size(self, d: int) -> int:
        """n."""
        return padded_size(d) if self.shared else 0

    @property
    def lengthens(self) -> bool:  # type: ignore[override]
        """What is unbiased lengthens."""
        return self.unbiased

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + 4 + stream_bytes(padded_size(d), self.bits)

    def encode(self, v: ArrayLike, draws: CodecDraws, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector = as_vector(v)
        r = rotated(vector, draws.signs(padded_size(len(vector))))
        codes, scale = rotation_codes(r, self.bits, self.mode)
        head = FrameHeader(self.id, self.bits, len(vector))
        return head.pack() + float32_bytes(np.array([scale])) + pack_bits(codes, self.bits)

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_header(head, FrameHeader(self.id, self.bits, head.d))
        check_length(body, self.size(head.d) - HEADER)
        n, scale = padded_size(head.d), float(read_float32(body, 1)[0])
        if scale < 0:
            raise ClientError("a frame holds a negative norm or scale")
        try:
            codes = unpack_bits(body[4:], n, self.bits).astype(np.int64)
        except ArgumentError as error:
            raise ClientError(f"codes in a frame: {error}") from None
        return rotation_decoded(codes, scale, draws.signs(n), self.bits, head.d)

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Where the body holds float32 that the vector is linear in."""
        return [slice(0, 4)]


def flat_reach(n: int, clients: int) -> float:
    """By how much smaller than a vector's length the entries of its rotation (n,) are, of any of so many ``clients``:
    sqrt(2 ln(2 n m)/n), which few exceed."""
    return float(min(1.0, np.sqrt(2 * np.log(2 * n * clients) / n)))


def padded_size(d: int) -> int:
    """n = 2^ceil(log2 d)."""
    return 1 << (d - 1).bit_length()
