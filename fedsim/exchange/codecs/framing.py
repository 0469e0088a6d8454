"""The frame of one vector: a header of 8 bytes and a body, as it travels and as it is counted.

Header, little endian: codec (uint8), bits of a code (uint8), flags (uint8: 1 places as a bitmap, 2 body compressed
by zstd), log2 of the bucket (uint8, 0: the whole vector), number of entries d (uint32). What a body holds is said by
the codec. A frame that comes from elsewhere is believed in nothing: whatever does not fit is a ``ClientError``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ClientError, ConfigError

FORMAT = struct.Struct("<BBBBI")
HEADER = FORMAT.size  # bytes
NAMES = (
    "float32",
    "top_k",
    "random_k",
    "qsgd",
    "sign",
    "rotate",
    "low_rank",
    "ring",
    "nonzero",
)  # by codec id
FLOAT32, RING = NAMES.index("float32"), NAMES.index("ring")
BITMAP, ZSTD = 1, 2  # flags
ZSTD_LEVEL = 3
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class FrameHeader:
    """The first 8 bytes of a frame."""

    codec: int
    bits: int
    d: int
    flags: int = 0
    bucket: int = 0  # entries that share a norm, a power of two; 0: all

    def pack(self) -> bytes:
        """The header as it travels."""
        log = self.bucket.bit_length() - 1 if self.bucket else 0
        return FORMAT.pack(self.codec, self.bits, self.flags, log, self.d)

    @staticmethod
    def read(frame: bytes) -> FrameHeader:
        """The header of a frame.

        Raises:
            ClientError: if it is cut off, or of no known codec.
        """
        if len(frame) < HEADER:
            raise ClientError(f"a frame of {len(frame)} bytes; its header alone takes {HEADER}")
        codec, bits, flags, log, d = FORMAT.unpack_from(frame)
        if codec >= len(NAMES) or flags & ~(BITMAP | ZSTD) or log > 31:
            raise ClientError(f"a frame of codec {codec}, flags {flags}, bucket 2^{log}: there is none such")
        return FrameHeader(codec, bits, d, flags, 1 << log if log else 0)


def float32_bytes(values: NDArray[Any]) -> bytes:
    """Numbers as little-endian float32.

    Raises:
        ClientError: if one is not finite as a float32.
    """
    if values.size and not np.abs(values).max() <= LARGEST:
        raise ClientError(f"a vector holds NaN or numbers above {LARGEST:.3g}, which no float32 is")
    return bytes(values.astype("<f4").tobytes())


def read_float32(body: bytes, count: int) -> NDArray[np.float64]:
    """The first ``count`` numbers of a body, in float64; refused if one is not finite."""
    found = np.frombuffer(body, "<f4", count).astype(np.float64)
    if not np.isfinite(found).all():
        raise ClientError("a frame holds numbers that are not finite")
    return found


def float32_frame(v: NDArray[np.float64]) -> bytes:
    """The frame of a vector as it is, rounded to float32: codec 0."""
    return FrameHeader(FLOAT32, 32, len(v)).pack() + float32_bytes(v)


def compressed(frame: bytes) -> bytes:
    """The frame with its body compressed by zstd, if that is shorter; lossless."""
    head = FrameHeader.read(frame)
    body = zstandard().ZstdCompressor(level=ZSTD_LEVEL).compress(frame[HEADER:])
    if len(body) >= len(frame) - HEADER:
        return frame
    return FrameHeader(head.codec, head.bits, head.d, head.flags | ZSTD, head.bucket).pack() + bytes(body)


def uncompressed(frame: bytes, most: int) -> bytes:
    """The inverse of :func:`compressed`; a body is at most ``most`` bytes long.

    Raises:
        ClientError: if it is longer, or no zstd.
    """
    head, body = FrameHeader.read(frame), frame[HEADER:]
    if not head.flags & ZSTD:
        return frame
    zstd = zstandard()
    try:
        length = zstd.frame_content_size(body)
        if not 0 <= length <= most:
            raise ClientError(
                f"a compressed frame says that it holds {length} bytes; expected at most {most}"
            )
        whole = zstd.ZstdDecompressor().decompress(body, max_output_size=most, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise ClientError(f"a compressed frame cannot be read: {error}") from None
    return FrameHeader(head.codec, head.bits, head.d, head.flags & ~ZSTD, head.bucket).pack() + bytes(whole)


def zstandard() -> Any:
    """The library, imported where it is used.

    Raises:
        ConfigError: naming the extra that brings it.
    """
    try:
        import zstandard as library
    except ImportError:
        raise ConfigError(
            "compression.zstd=true: zstandard is not installed; pip install 'fedsim-lab[compression]', or false"
        ) from None
    return library
