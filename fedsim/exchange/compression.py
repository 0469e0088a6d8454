"""The settings of group ``compression``: a codec, what it is applied to, and error feedback.

Each function here makes the :class:`Compression` of one option; ``fedsim.exchange.codecs`` holds the codecs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ArgumentError, ClientError, check_choice, check_setting
from fedsim.exchange import codecs
from fedsim.exchange.codecs import FrameCodec, StageDraws, compressed, scaled, to_frame, uncompressed
from fedsim.exchange.codecs.framing import zstandard

if TYPE_CHECKING:
    from fedsim.exchange.normals import Draws
    from fedsim.task.layout import Layout

DOWN: dict[str, tuple[Any, dict[str, Any]]] = {  # codecs of the way down, and their options
    "qsgd": (codecs.QSGD, {"levels": 127, "norm": "max", "bucket": 512}),
    "rotate": (codecs.Rotate, {"bits": 4, "mode": "unbiased"}),
    "float16": (codecs.Float16, {}),
    # those that leave entries out send what the model moved by; random_k without d/k, which would overshoot
    "top_k": (codecs.TopK, {"rate": 0.01}),
    "random_k": (codecs.RandomK, {"rate": 0.1, "scale": "contractive"}),
    "sign": (codecs.Sign, {}),
    "low_rank": (codecs.LowRank, {"rank": 2}),
}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How vectors are made shorter: a ``stages.Codec``.

    ``only``: names of the vectors that are encoded (None: all). ``downlink``: what the model is sent to clients by.
    """

    codec: FrameCodec
    feedback: bool
    feedback_decay: float = 1.0
    only: tuple[str, ...] | None = None
    zstd: bool = False
    downlink: FrameCodec | None = None

    @property
    def unbiased(self) -> bool:
        """See ``FrameCodec``."""
        return self.codec.unbiased

    @property
    def lengthens(self) -> bool:
        """See ``FrameCodec``."""
        return self.codec.lengthens

    @property
    def linear(self) -> bool:
        """See ``FrameCodec``."""
        return self.codec.linear

    @property
    def shared(self) -> bool:
        """See ``FrameCodec``."""
        return self.codec.shared

    def support(self, d: int, draws: Draws) -> Tensor | None:
        """Places (k,) that frames of ``d`` entries hold, where they are the same for all clients; None: all."""
        found = self.codec.support(d, StageDraws(draws))
        return None if found is None else torch.from_numpy(found)

    def flat(self, v: Tensor, draws: Draws) -> Tensor:
        """``v`` (d,) rotated, (n,), float64: see ``FrameCodec.flat``."""
        found = self.codec.flat(v.cpu().numpy(), StageDraws(draws))
        return v if found is None else torch.from_numpy(found)

    def unflat(self, r: Tensor, draws: Draws, d: int) -> Tensor:
        """The inverse of ``flat``, (d,)."""
        return torch.from_numpy(self.codec.unflat(r.cpu().numpy(), StageDraws(draws), d))

    def flat_size(self, d: int) -> int:
        """How many numbers ``flat`` makes of ``d``; 0 where it changes nothing."""
        return self.codec.flat_size(d)

    def takes(self, vector: str) -> bool:
        """Whether vectors of this name are encoded."""
        return self.only is None or vector in self.only

    def encode(self, v: Tensor, draws: Draws, layout: Layout | None) -> Tensor:
        """The frame (n,), uint8, of ``v`` (d,); float32 where the codec's is no shorter."""
        return as_tensor(to_frame(self.codec, v.cpu().numpy(), StageDraws(draws), shapes(layout), self.zstd))

    def decode(self, frame: Tensor, draws: Draws, layout: Layout | None, d: int | None = None) -> Tensor:
        """What the frame stands for, (d,), float64; refused if it is of another number of entries."""
        return self.codec.decode(as_bytes(frame), StageDraws(draws), shapes(layout), d)

    def shrink(self, frame: Tensor, factor: float, layout: Layout | None) -> Tensor:
        """The frame of what is decoded times ``factor``."""
        whole = uncompressed(as_bytes(frame), most=1 << 40)  # our own
        shorter = scaled(self.codec, whole, factor, shapes(layout))
        return as_tensor(compressed(shorter) if self.zstd else shorter)

    @property
    def standing(self) -> bool:
        """Whether the way down leaves entries out, so that it sends the difference to what clients hold."""
        return self.downlink is not None and self.downlink.shrinks

    def encode_down(self, v: Tensor, draws: Draws, layout: Layout | None = None) -> Tensor:
        """The frame of a model that is sent to clients, or of what it moved by."""
        assert self.downlink is not None
        return as_tensor(to_frame(self.downlink, v.cpu().numpy(), StageDraws(draws), shapes(layout)))

    def decode_down(self, frame: Tensor, draws: Draws, d: int, layout: Layout | None = None) -> Tensor:
        """What clients start from, or move their model by."""
        assert self.downlink is not None
        return self.downlink.decode(as_bytes(frame), StageDraws(draws), shapes(layout), d)


def top_k(
    rate: float,
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """The share ``rate`` of entries that are largest; with feedback unless ``feedback`` says otherwise."""
    return _of(codecs.TopK(rate), feedback, feedback_decay, only, zstd, down)


def random_k(
    rate: float,
    scale: str = "unbiased",
    shared: bool = False,
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """The share ``rate`` of entries at places drawn by the key, times d/k if ``unbiased``.

    ``shared``: all clients of a round send the same places, so that their sums stay sparse and can be masked.
    """
    return _of(codecs.RandomK(rate, scale, shared), feedback, feedback_decay, only, zstd, down)


def nonzero(only: Sequence[str] | None = None, zstd: bool = False) -> Compression:
    """The entries that are not zero: for methods that leave most of them out. Nothing is lost but what a float32 cannot
    hold."""
    return _of(codecs.Nonzero(), False, 1.0, only, zstd, None)


def qsgd(
    levels: int,
    norm: str = "max",
    bucket: int = 512,
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """Each entry on one of 2 ``levels`` + 1 levels of its bucket, rounded at random."""
    return _of(codecs.QSGD(levels, norm, bucket), feedback, feedback_decay, only, zstd, down)


def sign(
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """One bit an entry and the mean size."""
    return _of(codecs.Sign(), feedback, feedback_decay, only, zstd, down)


def rotate(
    bits: int,
    mode: str = "unbiased",
    shared: bool = False,
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """A random rotation, then ``bits`` an entry.

    ``shared``: all clients of a round rotate alike. Below secure sums nothing is coded then: the rotated entries, all
    of like size, are rounded to the finer levels of a ring that reaches less far.
    """
    return _of(codecs.Rotate(bits, mode, shared), feedback, feedback_decay, only, zstd, down)


def low_rank(
    rank: int,
    feedback: bool | None = None,
    feedback_decay: float = 1.0,
    only: Sequence[str] | None = None,
    zstd: bool = False,
    down: Mapping[str, Any] | None = None,
) -> Compression:
    """Each matrix of the model as a product of ``rank`` columns and rows."""
    return _of(codecs.LowRank(rank), feedback, feedback_decay, only, zstd, down)


def _of(
    codec: FrameCodec,
    feedback: bool | None,
    decay: float,
    only: Sequence[str] | None,
    zstd: bool,
    down: Mapping[str, Any] | None,
) -> Compression:
    check_setting("compression", 0 <= decay <= 1, "feedback_decay", decay, "must be within 0..1")
    named = only is None or (not isinstance(only, str) and len(only) > 0)
    check_setting("compression", named, "only", only, "must name a vector, as [delta], or be null for all")
    if zstd:
        zstandard()
    return Compression(
        codec=codec,
        feedback=(not codec.unbiased) if feedback is None else feedback,
        feedback_decay=decay,
        only=None if only is None else tuple(only),
        zstd=zstd,
        downlink=_downlink(down),
    )


def _downlink(down: Mapping[str, Any] | None) -> FrameCodec | None:
    """The codec of the down-link: ``{codec: qsgd, levels: 127}``."""
    if down is None:
        return None
    check_setting(
        "compression",
        isinstance(down, Mapping),
        "down",
        down,
        "must be a codec with its options: {codec: qsgd, levels: 127}",
    )
    options = {str(k): v for k, v in down.items()}
    name = options.pop("codec", None)
    check_choice("compression.down.codec", name, tuple(DOWN))
    made, known = DOWN[str(name)]
    standing = options.pop("standing", made.shrinks)
    what = "a share of a model, so clients must hold the rest" if made.shrinks else "every entry of a model"
    why = f"{name} sends {what}; leave standing out"
    check_setting("compression.down", standing is made.shrinks, "standing", standing, why)
    for key, value in options.items():
        check_choice("compression.down: the key", key, (*known, "codec", "standing"))
        if key == "rate":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            check_setting("compression.down", number, key, value, "must be a number")
        elif key == "scale":
            why = "times d/k, each difference would overshoot; leave scale out (it is contractive)"
            check_setting("compression.down", value == "contractive", key, value, why)
        else:
            whole = key in ("norm", "mode") or type(value) is int
            check_setting("compression.down", whole, key, value, "must be a whole number")
    try:
        found: FrameCodec = made(*{**known, **options}.values())
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("compression.", "compression.down.")) from None
    return found


def shapes(layout: Layout | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of a model's tensors in the order of its flat vector."""
    return () if layout is None else tuple(slot.shape for slot in layout.params)


def as_tensor(frame: bytes) -> Tensor:
    """A frame as an array that travels."""
    return torch.from_numpy(np.frombuffer(frame, np.uint8).copy())


def as_bytes(frame: Tensor) -> bytes:
    """The inverse of :func:`as_tensor`; refuses what is no row of bytes."""
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise ClientError(f"a frame is a row of bytes; this is {tuple(frame.shape)}, {frame.dtype}")
    return frame.cpu().numpy().tobytes()
