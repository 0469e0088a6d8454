"""Shamir's shares of a 32-byte secret (Shamir 1979) over GF(2^128), as Flower's utilities lay them out.

A share is its index (4 bytes, little endian, from 1) and 16 bytes for each 16 bytes of the padded secret: 52 in all.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.errors import ArgumentError
from fedsim.exchange.secagg.masks import SECRET, _primitives

BLOCK = 16  # bytes that are shared at once
SHARE = 4 + (SECRET // BLOCK + 1) * BLOCK  # bytes of a share


def split(secret: bytes, t: int, n: int) -> list[bytes]:
    """``n`` shares of a secret, of which any ``t`` give it back and fewer nothing.

    Raises:
        ArgumentError: if the secret has another length, or t is not within 1..n.
    """
    if len(secret) != SECRET or not 1 <= t <= n:
        raise ArgumentError(
            f"{t} of {n} shares of {len(secret)} bytes; expected 1 <= t <= n and {SECRET} bytes"
        )
    if t == 1:  # nothing to hide: the polynomial is constant
        return [_index(i) + _padded(secret) for i in range(1, n + 1)]
    shares = [_index(i) for i in range(1, n + 1)]
    for block in _blocks(_padded(secret)):
        for i, part in _primitives().Shamir.split(t, n, block):
            shares[i - 1] += part
    return shares


def join(shares: Sequence[bytes]) -> bytes | None:
    """The secret that at least t shares give; None where they are fewer, damaged or not of one secret."""
    if not shares or {len(s) for s in shares} != {SHARE}:
        return None
    index = [int.from_bytes(s[:4], "little") for s in shares]
    if len(set(index)) < len(index) or 0 in index:
        return None
    if len(shares) == 1:
        padded = shares[0][4:]
    else:
        padded = b"".join(
            _primitives().Shamir.combine(
                [(i, s[4 + at : 4 + at + BLOCK]) for i, s in zip(index, shares, strict=True)]
            )
            for at in range(0, SHARE - 4, BLOCK)
        )
    return padded[:SECRET] if padded[SECRET:] == bytes([BLOCK]) * BLOCK else None


def _index(i: int) -> bytes:
    return i.to_bytes(4, "little")


def _padded(secret: bytes) -> bytes:
    """The secret and one block more, which tells a wrong one (PKCS 7)."""
    return secret + bytes([BLOCK]) * BLOCK


def _blocks(padded: bytes) -> list[bytes]:
    return [padded[at : at + BLOCK] for at in range(0, len(padded), BLOCK)]
