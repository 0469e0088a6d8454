"""Pairwise and own masks of secure aggregation (Bonawitz et al. 2017), from key streams of 256-bit keys.

y_i = q_i + PRG(self_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij) mod R: pair masks cancel in the sum over those
who deliver; own masks and the pair masks of those who do not are taken out with secrets that their neighbours recover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fedsim.errors import ConfigError
from fedsim.exchange.secagg.ring import Residues, ring_sum

SECRET = 32  # bytes of a key, private or public, and of a seed
NONCE = bytes(16)  # counter and nonce of the key stream: each key makes one stream


def key_stream(key: bytes, size: int) -> bytes:
    """``size`` bytes of the ChaCha20 key stream of a 32-byte key, counter and nonce zero."""
    from_library = _primitives()
    cipher = from_library.Cipher(from_library.ChaCha20(key, NONCE), mode=None)
    return bytes(cipher.encryptor().update(bytes(size)))


def PRG(key: bytes, d: int, B: int) -> Residues:  # noqa: N802 - the symbol of the equations
    """A mask (d,) of residues below 2^B: little-endian words of ceil(B/8) bytes of the key stream, their low B bits."""
    width = -(-B // 8)
    words = np.zeros((d, 8), np.uint8)
    words[:, :width] = np.frombuffer(key_stream(key, d * width), np.uint8).reshape(d, width)
    return words.view("<u8").reshape(d).astype(np.uint64) & np.uint64((1 << B) - 1)


def public_key(private: bytes) -> bytes:
    """The X25519 public key, 32 bytes, of a private one."""
    return bytes(_private(private).public_key().public_bytes_raw())


def is_public_key(public: bytes) -> bool:
    """Whether two can agree on something by it: points of low order, such as 32 zeros, give everybody nothing."""
    try:
        _private(bytes(SECRET)).exchange(_primitives().X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def agreed(private: bytes, public: bytes, run: str, info: str) -> bytes:
    """The 32 bytes that two clients share: HKDF-SHA256 of X25519, salted by the run's id.

    Raises:
        ValueError: if the public key is none.
    """
    lib = _primitives()
    shared = _private(private).exchange(lib.X25519PublicKey.from_public_bytes(public))
    kdf = lib.HKDF(algorithm=lib.SHA256(), length=SECRET, salt=run.encode(), info=info.encode())
    return bytes(kdf.derive(shared))


def pair_key(private: bytes, public: bytes, run: str, round: int, vector: str) -> bytes:
    """s_ij of two clients for one vector of one round, the same from either side."""
    return agreed(private, public, run, f"fedsim/mask/{round}/{vector}")


def masked(i: int, residues: ArrayLike, own: ArrayLike, pairs: Mapping[int, ArrayLike], B: int) -> Residues:
    """y_i of client ``i``: its residues with its own mask and, by neighbour, those shared with others."""
    parts = [np.asarray(residues, np.uint64), np.asarray(own, np.uint64)]
    for j, mask in pairs.items():
        parts.append(np.asarray(mask, np.uint64) if j > i else _negative(mask))
    return ring_sum(parts, B)


def unmasked(
    masked_sum: ArrayLike,
    own: Mapping[int, ArrayLike],
    broken: Mapping[tuple[int, int], ArrayLike],
    B: int,
) -> Residues:
    """The survivors' sum: without their own masks, and without pair masks (survivor, dropped) that found no partner."""
    parts = [np.asarray(masked_sum, np.uint64), *map(_negative, own.values())]
    for (i, j), mask in broken.items():
        parts.append(_negative(mask) if j > i else np.asarray(mask, np.uint64))
    return ring_sum(parts, B)


def seal(key: bytes, plain: bytes, random: Callable[[int], bytes]) -> bytes:
    """``plain`` encrypted by ChaCha20-Poly1305: 12 bytes of nonce and 16 of the tag more."""
    nonce = random(12)
    return nonce + bytes(_primitives().ChaCha20Poly1305(key).encrypt(nonce, plain, None))


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The inverse of :func:`seal`; None of what was not sealed with this key."""
    lib = _primitives()
    try:
        return bytes(lib.ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], None))
    except (lib.InvalidTag, ValueError):
        return None


def _negative(mask: ArrayLike) -> Residues:
    return np.uint64(0) - np.asarray(mask, np.uint64)


def _private(private: bytes) -> Any:
    return _primitives().X25519PrivateKey.from_private_bytes(private)


def _primitives() -> Any:
    """The classes of ``cryptography`` that are used, imported when they are.

    Raises:
        ConfigError: naming the extra that brings them.
    """
    try:
        from fedsim.exchange.secagg import primitives
    except ImportError as missing:
        raise ConfigError(
            f"secagg=masks: {missing.name} is not installed; pip install 'fedsim-lab[flower]', or secagg=ring"
        ) from None
    return primitives
