"""What a slope becomes on its way: ``log8``, a byte; ``ref9``, nine bits, the reference code's grid; ``float32``;
``float64``, with which codecs are compared.

A codec maps slopes g, any shape, to codes, and codes to the values that everybody computes with: also who measured g
goes on with ``decode(encode(g))``, or the copies of the model part. Each has one code for "not there", which decodes
to 0: such an entry is not in a round's list. Just One Byte, arXiv 2306.10015; the grids are described in
docs/zeroth_order.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Codes = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SlopeCodec:
    """``encode`` and ``decode`` of arrays; ``absent``, the code of what is not there; ``bits`` of a code."""

    name: str
    bits: int
    absent: float
    dtype: type
    encode: Callable[[ArrayLike], Codes]
    decode: Callable[[Codes], Floats]

    def nbytes(self, count: int) -> int:
        """Bytes that ``count`` codes take."""
        return -(-count * self.bits // 8)

    def nothing(self, count: int) -> Codes:
        """Codes (count,) of what is not there."""
        return np.full(count, self.absent, self.dtype)

    def is_absent(self, codes: Codes) -> NDArray[np.bool_]:
        """Which of ``codes`` say that there is nothing."""
        return np.isnan(codes) if np.isnan(self.absent) else codes == self.absent

    def pack(self, codes: Codes) -> bytes:
        """The codes (n,) as bytes, ``nbytes(n)`` of them."""
        if self.bits == 9:
            places = np.arange(8, -1, -1)
            return np.packbits((codes[:, None] >> places & 1).astype(np.uint8)).tobytes()
        return np.ascontiguousarray(codes).astype(f"<{np.dtype(self.dtype).str[1:]}").tobytes()

    def unpack(self, data: bytes, count: int) -> Codes:
        """The inverse of ``pack``.

        Raises:
            ValueError: if ``data`` is not that long.
        """
        if len(data) != self.nbytes(count):
            raise ValueError(
                f"{len(data)} bytes, expected {self.nbytes(count)}: {count} slopes in {self.name}"
            )
        raw = np.frombuffer(data, np.uint8)
        if self.bits == 9:
            bits = np.unpackbits(raw)[: 9 * count].reshape(count, 9).astype(np.int64)
            return (bits @ (1 << np.arange(8, -1, -1))).astype(self.dtype)
        return np.frombuffer(data, f"<{np.dtype(self.dtype).str[1:]}").astype(self.dtype)


def log8_encode(g: ArrayLike) -> NDArray[np.uint8]:
    """One byte: 0 is zero (and what is not finite); else bit 7 the sign, the low seven
    ``k = clip(round(8 ln|g|) + 64, 1, 127)``.

    Its values go from 3.8e-4 to 2.6e3, 6.45 % apart from g at most; smaller slopes become the smallest one.
    """
    return _logarithmic(g, 8, 64, 1, 127, 128).astype(np.uint8)


def log8_decode(b: ArrayLike) -> Floats:
    """``exp((k - 64) / 8)`` with its sign; 0 of 0 and of 128, which says that there is nothing."""
    return _exponential(b, 8, 64, 128)


def ref9_encode(g: ArrayLike) -> NDArray[np.uint16]:
    """Nine bits, the grid of the reference code: ``round(16 ln|g|)`` within -127 .. 127, plus 128, and a sign (256).

    Code 0 is zero, which the reference's grid has not. At most 3.2 % from g.
    """
    return _logarithmic(g, 16, 128, 1, 255, 256).astype(np.uint16)


def ref9_decode(b: ArrayLike) -> Floats:
    """``exp((k - 128) / 16)`` with its sign; 0 of 0 and of 256."""
    return _exponential(b, 16, 128, 256)


def float32_encode(g: ArrayLike) -> NDArray[np.float32]:
    """The number itself, 0 for what is not finite."""
    with np.errstate(over="ignore"):
        out = np.asarray(g, np.float64).astype(np.float32)
    return np.where(np.isfinite(out), out, np.float32(0))


def float64_encode(g: ArrayLike) -> Floats:
    """The same in eight bytes."""
    out = np.asarray(g, np.float64)
    return np.where(np.isfinite(out), out, 0.0)


def float_decode(b: ArrayLike) -> Floats:
    """The number itself; 0 of NaN, which says that there is nothing."""
    b = np.asarray(b, np.float64)
    return np.where(np.isnan(b), 0.0, b)


def _logarithmic(g: ArrayLike, steps: int, zero: int, low: int, high: int, sign: int) -> NDArray[np.int64]:
    """Codes on a grid of ``steps`` per factor e."""
    g = np.asarray(g, np.float64)
    usable = np.isfinite(g) & (g != 0)
    k = np.clip(np.rint(steps * np.log(np.abs(np.where(usable, g, 1.0)))) + zero, low, high).astype(np.int64)
    return np.where(usable, k + sign * (g < 0), 0)


def _exponential(b: ArrayLike, steps: int, zero: int, sign: int) -> Floats:
    b = np.asarray(b).astype(np.int64)
    k = b % sign
    size = np.where(k > 0, np.exp((k - zero) / steps), 0.0)
    return np.asarray(np.where(b >= sign, -size, size) + 0.0)


PLAIN = ("float32", "float64")
CODECS = {
    "log8": SlopeCodec("log8", 8, 128, np.uint8, log8_encode, log8_decode),
    "ref9": SlopeCodec("ref9", 9, 256, np.uint16, ref9_encode, ref9_decode),
    "float32": SlopeCodec("float32", 32, float("nan"), np.float32, float32_encode, float_decode),
    "float64": SlopeCodec("float64", 64, float("nan"), np.float64, float64_encode, float_decode),
}


def saturated(codec: str, codes: Codes) -> float:
    """Share of ``codes`` at the smallest magnitude, to which smaller slopes are rounded up; 0 of floating point."""
    if codec in PLAIN or not codes.size:
        return 0.0
    return float(np.mean(codes % int(CODECS[codec].absent) == 1))


def measured(codec: str, codes: Codes) -> dict[str, float]:
    """``saturated`` as a metric of an update; none of floating point, where nothing saturates."""
    return {} if codec in PLAIN else {"saturated": saturated(codec, codes)}
