"""Every entry in two bytes, for the way down: IEEE half precision, rounded to nearest, ties to even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fedsim.errors import ClientError
from fedsim.exchange.codecs.codec import (
    CodecDraws,
    FrameCodec,
    Shapes,
    Vector,
    as_vector,
    check_header,
    check_length,
)
from fedsim.exchange.codecs.framing import FLOAT32, HEADER, FrameHeader

LARGEST = float(np.finfo(np.float16).max)  # 65504


@dataclass(frozen=True)
class Float16(FrameCodec):
    """Numbers as little-endian float16: off by 2^-11 of themselves, and by 2^-25 below 2^-14. A frame of codec 0, of 16
    bits."""

    id: ClassVar[int] = FLOAT32

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        return HEADER + 2 * d

    def encode(self, v: ArrayLike, draws: CodecDraws | None = None, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,).

        Raises:
            ClientError: if one is not finite as a float16.
        """
        vector = as_vector(v)
        with np.errstate(over="ignore"):
            half = vector.astype("<f2")
        if not np.isfinite(half).all():
            raise ClientError(
                f"a vector holds numbers above {LARGEST:g}, which no float16 is; choose another codec"
            )
        return FrameHeader(self.id, 16, len(vector)).pack() + half.tobytes()

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_header(head, FrameHeader(self.id, 16, head.d))
        check_length(body, 2 * head.d)
        found = np.frombuffer(body, "<f2").astype(np.float64)
        if not np.isfinite(found).all():
            raise ClientError("a frame holds numbers that are not finite")
        return found

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """None are float32: it goes down, where nothing is fitted to a bound."""
        return []
