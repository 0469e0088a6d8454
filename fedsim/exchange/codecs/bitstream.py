"""Codes of a few bits each as a stream of bytes, little endian: code i fills bits [i b, (i + 1) b), bit 0 the lowest of
byte 0. What is left of the last byte is zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import ArgumentError

MOST_BITS = 62  # of a code: sums and differences of two still fit int64


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits each."""
    return -(-count * bits // 8)


def pack_bits(codes: ArrayLike, bits: int) -> bytes:
    """Codes (n,), whole numbers in [0, 2^bits), as a bit stream of ``stream_bytes(n, bits)`` bytes.

    Raises:
        ArgumentError: if ``bits`` is not within 1..62 or a code does not fit.
    """
    words = _words(codes, bits)
    if bits % 8 == 0:
        return words[:, : bits // 8].tobytes()
    if bits == 1:
        return np.packbits(words[:, 0], bitorder="little").tobytes()
    return np.packbits(
        np.unpackbits(words, axis=1, count=bits, bitorder="little"), bitorder="little"
    ).tobytes()


def unpack_bits(stream: bytes | NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint64]:
    """The inverse of :func:`pack_bits`: ``count`` codes (n,).

    Raises:
        ArgumentError: if the stream has another length, or anything but zeros after the last code.
    """
    _check_bits(bits)
    data = np.frombuffer(stream, np.uint8) if isinstance(stream, bytes) else np.asarray(stream, np.uint8)
    if len(data) != stream_bytes(count, bits):
        raise ArgumentError(
            f"{len(data)} bytes; {count} codes of {bits} bits take {stream_bytes(count, bits)}"
        )
    words = np.zeros((count, 8), np.uint8)
    if bits % 8 == 0:
        words[:, : bits // 8] = data.reshape(count, -1)
    else:
        whole: NDArray[Any] = np.unpackbits(data, bitorder="little")
        if whole[count * bits :].any():
            raise ArgumentError("the bits after the last code are not zero")
        rows = np.packbits(whole[: count * bits].reshape(count, bits), axis=1, bitorder="little")
        words[:, : rows.shape[1]] = rows
    return words.view("<u8").reshape(count).astype(np.uint64, copy=False)


def _words(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Each code as a row of the few bytes that ``bits`` bits need."""
    _check_bits(bits)
    array = np.asarray(codes)
    if array.size and (array.min() < 0 or int(array.max()) >> bits):
        raise ArgumentError(f"a code is not within 0..2^{bits} - 1")
    width = next(w for w in (1, 2, 4, 8) if bits <= 8 * w)
    return np.ascontiguousarray(array.ravel(), f"<u{width}").view(np.uint8).reshape(-1, width)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise ArgumentError(f"bits={bits}: must be within 1..{MOST_BITS}")
