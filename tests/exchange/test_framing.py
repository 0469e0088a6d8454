"""Frames at their edges: short and zero vectors, lengths that are bounded, frames that nobody made, zstd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from codec_cases import CODECS, SHAPES, draws, each_codec, heavy

from fedsim.errors import ArgumentError, ClientError
from fedsim.exchange.codecs import (
    QSGD,
    FrameCodec,
    LowRank,
    RandomK,
    Rotate,
    Sign,
    TopK,
    compressed,
    fit,
    scaled,
    to_frame,
    top_k_frame,
    uncompressed,
)
from fedsim.exchange.codecs.framing import FrameHeader, float32_frame


@each_codec
@pytest.mark.parametrize("d", [1, 2, 65])
def test_zero_and_short_vectors(codec: FrameCodec, d: int) -> None:
    for v in (np.zeros(d), np.arange(d) - 0.5):
        frame = codec.encode(v, draws(), [(d,)])
        assert len(frame) == codec.size(d, [(d,)])
        found = codec.decode(frame, draws(), [(d,)], d=d)
        assert found.shape == (d,) and (v.any() or not found.any())
        sent = to_frame(codec, v, draws(), [(d,)])
        assert len(sent) <= 8 + 4 * d
        assert torch.equal(codec.decode(sent, draws(), [(d,)]), found) or sent == float32_frame(v)


def test_decoding_is_the_same_from_any_codec_of_a_dense_frame() -> None:
    v = heavy(9)
    for codec in CODECS.values():
        np.testing.assert_array_equal(codec.decode(float32_frame(v), draws()).numpy(), v.astype(np.float32))


@each_codec
def test_who_says_that_it_never_lengthens_does_not_and_the_rest_fits_afterwards(codec: FrameCodec) -> None:
    for seed in range(1000):
        v = heavy(128, seed)
        frame = codec.encode(v, draws(seed), [(128,)])
        y = codec.decode(frame, draws(seed), [(128,)])
        C = float(np.linalg.norm(v))
        if not codec.lengthens:
            assert float(y.norm()) <= C * (1 + 1e-6)
        shorter, y = fit(codec, frame, y, C, draws(seed), [(128,)])
        assert float(y.norm()) <= C * (1 + 1e-6) and len(shorter) == len(frame)


@each_codec
def test_scaling_a_frame_scales_the_vector(codec: FrameCodec) -> None:
    v = heavy()
    frame = codec.encode(v, draws(), SHAPES)
    y = codec.decode(frame, draws(), SHAPES)
    found = codec.decode(scaled(codec, frame, 0.25, SHAPES), draws(), SHAPES)
    np.testing.assert_allclose(found.numpy(), 0.25 * y.numpy(), rtol=1e-6, atol=1e-12)


@each_codec
def test_frames_from_elsewhere_are_not_believed(codec: FrameCodec) -> None:
    frame = codec.encode(heavy(), draws(), SHAPES)
    for wrong, why in (
        (frame[:5], "header alone"),
        (frame[:-1], "bytes|places"),
        (frame + b"\0", "bytes|places"),
        (bytes([9]) + frame[1:], "none such"),
        (bytes([7]) + frame[1:], "ring"),
        (frame[:4] + b"\xff\xff\xff\xff" + frame[8:], "entries"),
    ):
        with pytest.raises(ClientError, match=why):
            codec.decode(wrong, draws(), SHAPES, d=4810)


def test_impossible_bodies() -> None:
    with pytest.raises(ClientError, match="ascending"):
        TopK(2 / 300).decode(top_k_frame(300, np.array([7, 7]), np.ones(2)), draws())
    with pytest.raises(ClientError, match="ascending"):
        TopK(2 / 300).decode(top_k_frame(300, np.array([7, 301]), np.ones(2)), draws())
    with pytest.raises(ClientError, match="not finite"):
        RandomK(1.0).decode(FrameHeader(2, 32, 1).pack() + np.float32([np.nan]).tobytes(), draws())
    qsgd_frame = FrameHeader(3, 2, 4).pack() + np.float32([1]).tobytes()
    with pytest.raises(ClientError, match="the code 3"):
        QSGD(1, "max", 0).decode(qsgd_frame + b"\xff", draws())
    with pytest.raises(ClientError, match="negative"):
        Sign().decode(FrameHeader(4, 1, 1).pack() + np.float32([-1]).tobytes() + b"\1", draws())
    for bad in ([np.inf], [np.nan], [1e39]):
        with pytest.raises(ClientError, match=r"finite|float32"):
            to_frame(QSGD(), bad, draws())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0.0),
        lambda: RandomK(1.5),
        lambda: RandomK(0.5, "raw"),
        lambda: QSGD(128),
        lambda: QSGD(0),
        lambda: QSGD(7, "l1"),
        lambda: QSGD(7, "max", 100),
        lambda: Rotate(5),
        lambda: Rotate(1, "most"),
        lambda: LowRank(0),
    ],
)
def test_impossible_settings(make: Any) -> None:
    with pytest.raises(ArgumentError, match="compression"):
        make()


def test_zstd_is_lossless_where_it_is_shorter() -> None:
    pytest.importorskip("zstandard")
    codec = QSGD(127, "l2", 0)  # its codes are nearly all zero
    frame = codec.encode(heavy(), draws())
    small = compressed(frame)
    assert len(small) < len(frame) / 2 and uncompressed(small, 20000) == frame
    assert torch.equal(codec.decode(small, draws()), codec.decode(frame, draws()))
    assert compressed(TopK(0.01).encode(heavy())) == TopK(0.01).encode(heavy())  # no gain: as it is
    with pytest.raises(ClientError, match="at most"):
        uncompressed(small, 10)
    with pytest.raises(ClientError, match=r"cannot be read|says that it holds"):
        codec.decode(small[:8] + b"\0" * 30, draws())
