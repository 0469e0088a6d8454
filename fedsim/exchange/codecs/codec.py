"""What every codec is: a vector to a frame and back, by draws that both sides make from one key.

``encode`` and ``decode`` work on vectors without padding, in float64 whatever the run's dtype. ``decode`` is pure: the
same frame gives the same bits anywhere. All fields of a frame that carry lengths (norms, scales, values) enter the
decoded vector linearly, so that ``scaled`` can shorten a vector without touching its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.codecs.framing import (
    FLOAT32,
    HEADER,
    NAMES,
    FrameHeader,
    compressed,
    float32_bytes,
    float32_frame,
    read_float32,
    uncompressed,
)

Vector = NDArray[np.float64]
Shapes = Sequence[Sequence[int]]  # of the tensors that a vector holds end to end


class CodecDraws(Protocol):
    """Randomness of one vector's frame; equal calls give equal numbers, here and at the receiver."""

    def uniforms(self, n: int) -> Vector:
        """Numbers in [0, 1), (n,)."""

    def places(self, d: int, k: int) -> NDArray[np.int64]:
        """``k`` of ``d`` places without replacement, ascending."""

    def signs(self, n: int) -> Vector:
        """+1 or -1 with equal chance, (n,)."""

    def normals(self, which: int, shape: tuple[int, int]) -> Vector:
        """Standard normal numbers for matrix number ``which``."""


@dataclass(frozen=True)
class StageDraws:
    """Draws from generators by stage, each fresh from its key: what ``fedsim.exchange.release`` gives."""

    stage: Callable[[str], torch.Generator]

    def uniforms(self, n: int) -> Vector:
        """Numbers in [0, 1), (n,)."""
        return np.asarray(torch.rand(n, generator=self.stage("rounding"), dtype=torch.float64).numpy())

    def places(self, d: int, k: int) -> NDArray[np.int64]:
        """``k`` of ``d`` places, ascending."""
        return np.sort(torch.randperm(d, generator=self.stage("places"))[:k].numpy())

    def signs(self, n: int) -> Vector:
        """+1 or -1, (n,)."""
        return torch.randint(0, 2, (n,), generator=self.stage("signs")).numpy() * 2.0 - 1.0

    def normals(self, which: int, shape: tuple[int, int]) -> Vector:
        """Standard normal numbers for matrix number ``which``."""
        drawn = torch.randn(shape, generator=self.stage(f"matrix/{which}"), dtype=torch.float64)
        return np.asarray(drawn.numpy())


class FrameCodec:
    """Base of all codecs. From its traits the refusals follow."""

    id: ClassVar[int]
    unbiased: ClassVar[bool] = False  # E[decode(encode(v))] = v
    lengthens: ClassVar[bool] = False  # |decode(encode(v))| may exceed |v|
    linear: ClassVar[bool] = False  # sums of frames of several clients are frames of the sum
    shared: ClassVar[bool] = False  # clients of an exchange have their draws in common
    shrinks: ClassVar[bool] = (
        False  # it may set entries to zero or to one size: for differences, not for weights
    )

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame of ``d`` entries, header included, before zstd."""
        raise NotImplementedError

    def encode(self, v: ArrayLike, draws: CodecDraws, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,), finite numbers."""
        raise NotImplementedError

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body; its header is known to be of this codec."""
        raise NotImplementedError

    def support(self, d: int, draws: CodecDraws) -> NDArray[np.int64] | None:
        """Of a linear codec, the places (k,), ascending, of a vector (d,) that frames hold; None: all of them."""
        return None

    def flat(self, v: ArrayLike, draws: CodecDraws) -> Vector | None:
        """Of a linear codec, ``v`` (d,) as n numbers of like size, of the same length, which are summed in fixed point
        in its place; None: it is not changed."""
        return None

    def unflat(self, r: ArrayLike, draws: CodecDraws, d: int) -> Vector:
        """The inverse of ``flat``."""
        raise NotImplementedError

    def flat_size(self, d: int) -> int:
        """n of ``flat``; 0 where it changes nothing."""
        return 0

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Which parts of a body of ``size`` bytes are float32 that the decoded vector is linear in."""
        raise NotImplementedError

    def decode(self, frame: bytes, draws: CodecDraws, layout: Shapes = (), d: int | None = None) -> Tensor:
        """The vector (d,) in float64 that a frame stands for; a frame of codec 0 is read by any codec.

        Raises:
            ClientError: what is wrong with the frame: length, codec, ``d``, places or numbers.
        """
        head = FrameHeader.read(frame)
        if d is not None and head.d != d:
            raise ClientError(f"a frame of {head.d} entries; expected {d}")
        if head.codec not in (FLOAT32, self.id):
            raise ClientError(f"a frame of codec {NAMES[head.codec]}; expected {NAMES[self.id]} or float32")
        frame = uncompressed(frame, most=8 * head.d + 64)
        head, body = FrameHeader.read(frame), frame[HEADER:]
        if head.codec == FLOAT32 and not (self.id == FLOAT32 and head.bits == 16):
            check_header(head, FrameHeader(FLOAT32, 32, head.d))
            check_length(body, 4 * head.d)
            return torch.from_numpy(read_float32(body, head.d))
        return torch.from_numpy(self.body(head, body, draws, layout))


def to_frame(
    codec: FrameCodec, v: ArrayLike, draws: CodecDraws, layout: Shapes = (), zstd: bool = False
) -> bytes:
    """What is sent of ``v``: the codec's frame, or float32 (codec 0) where that is not longer; zstd if asked for."""
    vector = as_vector(v)
    dense = HEADER + 4 * len(vector)
    frame = codec.encode(vector, draws, layout) if codec.size(len(vector), layout) < dense else b""
    frame = frame if 0 < len(frame) < dense else float32_frame(vector)
    return compressed(frame) if zstd else frame


def scaled(codec: FrameCodec, frame: bytes, factor: float, layout: Shapes = ()) -> bytes:
    """The frame (not yet zstd) whose decoded vector is ``factor`` times as long: codes stay, lengths are multiplied."""
    head, body = FrameHeader.read(frame), bytearray(frame[HEADER:])
    whole = [slice(0, len(body))]
    for part in whole if head.codec == FLOAT32 else codec.lengths(head, len(body), layout):
        numbers = np.frombuffer(bytes(body[part]), "<f4").astype(np.float64)
        body[part] = float32_bytes(numbers * factor)
    return frame[:HEADER] + bytes(body)


def fit(
    codec: FrameCodec, frame: bytes, decoded: Tensor, C: float, draws: CodecDraws, layout: Shapes = ()
) -> tuple[bytes, Tensor]:
    """Fit to C: a frame whose decoded vector is at most ``C`` long, by the factor min(1, C/|decoded|), and the vector.

    Privacy bounds what is summed, and some codecs lengthen vectors.
    """
    length = float(torch.linalg.vector_norm(decoded))
    if not length > C:
        return frame, decoded
    frame = scaled(codec, frame, C / length, layout)
    return frame, codec.decode(frame, draws, layout)


def as_vector(v: ArrayLike) -> Vector:
    """``v`` (d,) in float64, checked to be finite."""
    vector = np.ascontiguousarray(v, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ClientError(f"a vector of shape {vector.shape} cannot be encoded; expected (d,) with d >= 1")
    if not np.isfinite(vector).all():
        raise ClientError("a vector that is not finite cannot be encoded")
    return vector


def check_header(found: FrameHeader, expected: FrameHeader) -> None:
    """Refuse a header with other bits, flags or bucket than the receiver's codec has."""
    if found != expected:
        raise ClientError(f"a frame's header says {found}; expected {expected}")


def check_length(body: bytes, expected: int) -> None:
    """Refuse a body of another length."""
    if len(body) != expected:
        raise ClientError(f"a frame's body has {len(body)} bytes; expected {expected}")
