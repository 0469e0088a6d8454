"""Codecs against golden arrays and against what their equations say: frames byte for byte, lengths, bias, refusals."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from codec_cases import SHAPES, draws, heavy
from problems import GOLDEN

from fedsim.errors import ArgumentError, ClientError
from fedsim.exchange.codecs import (
    CENTROIDS,
    QSGD,
    FrameCodec,
    LowRank,
    Nonzero,
    RandomK,
    Rotate,
    Sign,
    TopK,
    low_rank,
    low_rank_decoded,
    pack_bits,
    qsgd,
    qsgd_decoded,
    qsgd_variance,
    random_k,
    rotated,
    rotation_codes,
    rotation_decoded,
    scaled,
    sign,
    sign_decoded,
    to_frame,
    top_k,
    top_k_frame,
    unpack_bits,
    unrotated,
)
from fedsim.exchange.codecs.framing import float32_frame


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "release/codecs.npz") as z:
        return dict(z)


class Given:
    """Draws that a test hands over."""

    def __init__(self, **drawn: Any):
        self.drawn = drawn

    def uniforms(self, n: int) -> np.ndarray:
        return self.drawn["u"]

    def places(self, d: int, k: int) -> np.ndarray:
        return self.drawn["places"]

    def signs(self, n: int) -> np.ndarray:
        return self.drawn["signs"]

    def normals(self, which: int, shape: tuple[int, int]) -> np.ndarray:
        return self.drawn["Q"]


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 13, 16, 31, 32, 33, 62])
def test_bit_streams(bits: int) -> None:
    codes = [int(x) for x in np.random.default_rng(bits).integers(0, 1 << bits, 21)]
    whole = sum(c << (i * bits) for i, c in enumerate(codes))
    stream = pack_bits(codes, bits)
    assert stream == whole.to_bytes(-(-21 * bits // 8), "little")
    assert unpack_bits(stream, 21, bits).tolist() == codes


def test_codes_that_do_not_fit_a_stream() -> None:
    with pytest.raises(ArgumentError, match="not within"):
        pack_bits([4], 2)
    with pytest.raises(ArgumentError, match="take 2"):
        unpack_bits(b"\0", 3, 5)
    with pytest.raises(ArgumentError, match="not zero"):
        unpack_bits(b"\xff", 3, 2)


@pytest.mark.parametrize("k", [1, 3, 30, 300])
def test_golden_top_k(k: int) -> None:
    z, codec = golden(), TopK(k / 300)
    places = top_k(z["v"], k)
    np.testing.assert_array_equal(places, z[f"topk_{k}_idx"])
    frame = codec.encode(z["v"])
    assert frame == z[f"frame_topk_{k}"].tobytes() == top_k_frame(300, places, z["v"][places])
    assert len(frame) - 8 == z[f"topk_{k}_bytes"] == codec.size(300) - 8
    np.testing.assert_array_equal(codec.decode(frame, draws()).numpy(), z[f"topk_{k}_decoded"])


def test_top_k_of_equals_takes_the_lower_places() -> None:
    assert top_k([1.0, -2, 2, 0, 2, 3], 3).tolist() == [1, 2, 5]
    assert top_k([0.0, 0, 0], 2).tolist() == [0, 1]


def test_golden_random_k() -> None:
    z = golden()
    for scale in ("unbiased", "contractive"):
        np.testing.assert_allclose(random_k(z["v"], z["randk_idx"], scale), z[f"randk_{scale}"], atol=1e-12)
        codec = RandomK(0.1, scale)
        found = codec.decode(codec.encode(z["v"], Given(places=z["randk_idx"])), Given(places=z["randk_idx"]))
        np.testing.assert_allclose(found.numpy(), z[f"randk_{scale}"], atol=1e-12)


@pytest.mark.parametrize("bucket", [0, 64])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("s", [127, 7, 1])
def test_golden_qsgd(s: int, norm: str, bucket: int) -> None:
    z, codec = golden(), QSGD(s, norm, bucket)
    name = f"s{s}_{norm}_{bucket or 'all'}"
    codes, norms = qsgd(z["v"], z["u"], s, norm, bucket)
    np.testing.assert_array_equal(codes, z[f"qsgd_{name}_codes"])
    np.testing.assert_array_equal(norms, z[f"qsgd_{name}_norms"])
    np.testing.assert_allclose(qsgd_decoded(codes, norms, s, bucket), z[f"qsgd_{name}_decoded"], atol=1e-12)
    np.testing.assert_allclose(qsgd_variance(z["v"], s, norm, bucket), z[f"qsgd_{name}_variance"], rtol=1e-10)
    frame = codec.encode(z["v"], Given(u=z["u"]))
    assert len(frame) == codec.size(300)
    assert frame[-len(z[f"qsgd_{name}_packed"]) :] == z[f"qsgd_{name}_packed"].tobytes()
    if norm == "max":
        assert frame == z[f"frame_qsgd_{name}"].tobytes()
    np.testing.assert_allclose(codec.decode(frame, draws()).numpy(), z[f"qsgd_{name}_decoded"], atol=1e-12)


def test_golden_sign() -> None:
    z = golden()
    bits, scale = sign(z["v"])
    assert scale == z["sign_scale"] and pack_bits(bits, 1) == z["sign_packed"].tobytes()
    np.testing.assert_array_equal(sign_decoded(bits, scale), z["sign_decoded"])
    frame = Sign().encode(z["v"])
    assert frame == z["frame_sign"].tobytes() and len(frame) == Sign().size(300)
    np.testing.assert_array_equal(Sign().decode(frame, draws()).numpy(), z["sign_decoded"])


def test_golden_rotation() -> None:
    z = golden()
    signs, given = z["rotation_signs"], Given(signs=z["rotation_signs"].astype(float))
    r = rotated(z["v"], signs)
    np.testing.assert_allclose(r, z["rotated"], atol=1e-12)
    np.testing.assert_allclose(unrotated(r, signs, 300), z["v"], atol=1e-12)
    for b in (1, 2, 4):
        np.testing.assert_allclose(CENTROIDS[b], z[f"centroids_{b}"], atol=1e-13)
        for mode in ("unbiased", "least"):
            codes, scale = rotation_codes(r, b, mode)
            np.testing.assert_array_equal(codes, z[f"rotate{b}_{mode}_codes"])
            assert scale == z[f"rotate{b}_{mode}_scale"]
            decoded = rotation_decoded(codes, scale, signs, b, 300)
            np.testing.assert_allclose(decoded, z[f"rotate{b}_{mode}_decoded"], atol=1e-12)
        codec = Rotate(b)
        frame = codec.encode(z["v"], given)
        assert frame == z[f"frame_rotate{b}"].tobytes() and len(frame) == codec.size(300)
        found = codec.decode(frame, given)
        np.testing.assert_allclose(found.numpy(), z[f"rotate{b}_unbiased_decoded"], atol=1e-12)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_centroids_are_the_means_of_their_cells(b: int) -> None:
    """Lloyd's condition, by the density and the distribution of N(0, 1)."""
    c = [*CENTROIDS[b], math.inf]
    edges = [0.0, *((x + y) / 2 for x, y in zip(c, c[1:], strict=False))]
    for i, (a, e) in enumerate(zip(edges, edges[1:], strict=False)):
        mass = (math.erfc(a / math.sqrt(2)) - math.erfc(e / math.sqrt(2))) / 2
        mean = (math.exp(-a * a / 2) - math.exp(-e * e / 2)) / math.sqrt(2 * math.pi) / mass
        assert mean == pytest.approx(c[i], abs=1e-12)


def test_golden_low_rank() -> None:
    z = golden()
    P, Q = low_rank(z["low_rank_M"], z["low_rank_Q"])
    np.testing.assert_allclose(low_rank_decoded(P, Q), z["low_rank_decoded"], atol=1e-10)
    codec, given = LowRank(2), Given(Q=z["low_rank_Q"])
    frame = codec.encode(z["low_rank_M"].ravel(), given, [(12, 7)])
    assert len(frame) == 8 + 4 * 2 * (12 + 7) == codec.size(84, [(12, 7)])
    found = codec.decode(frame, given, [(12, 7)]).numpy().reshape(12, 7)
    np.testing.assert_allclose(found, z["low_rank_decoded"], atol=1e-5)  # P and Q' travel as float32


def test_low_rank_is_exact_where_the_rank_suffices_and_leaves_small_tensors_alone() -> None:
    rng = np.random.default_rng(0)
    M = np.outer(rng.normal(size=64), rng.normal(size=64))  # of rank 1 < 2
    v = np.concatenate([M.ravel(), rng.normal(size=4810 - 64 * 64)])
    codec = LowRank(2)
    found = codec.decode(codec.encode(v, draws(), SHAPES), draws(), SHAPES).numpy()
    np.testing.assert_allclose(found[: 64 * 64], M.ravel(), atol=1e-5)
    np.testing.assert_array_equal(found[64 * 64 : 64 * 64 + 64], v[64 * 64 : 64 * 64 + 64].astype(np.float32))
    assert to_frame(codec, v, draws()) == float32_frame(v)  # no matrices are known


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (TopK(0.01), 284),
        (TopK(0.1), 2534),
        (RandomK(0.1), 1932),
        (RandomK(0.01), 204),
        (QSGD(127), 4858),
        (QSGD(7), 2453),
        (QSGD(1), 1251),
        (QSGD(7, "l2", 0), 2417),
        (Sign(), 614),
        (Rotate(1), 1036),
        (Rotate(4), 4108),
        (LowRank(2), 1920),
    ],
    ids=str,
)
def test_bytes_of_4810_weights(codec: FrameCodec, size: int) -> None:
    """A network of 4810 weights, header included."""
    v = heavy()
    assert codec.size(4810, SHAPES) == len(codec.encode(v, draws(), SHAPES)) == size
    assert to_frame(codec, v, draws(), SHAPES) == codec.encode(v, draws(), SHAPES)
    assert len(float32_frame(v)) == 8 + 19240


def test_qsgd_is_unbiased_with_the_exact_variance() -> None:
    """The mean of 4000 draws within 0.5 % of max|v|, the variance within 2 % of the exact sum."""
    v = heavy(64, 3)
    rng = np.random.default_rng(0)
    found = np.array([qsgd_decoded(*qsgd(v, rng.random(64), 7), 7) for _ in range(4000)])
    assert np.abs(found.mean(0) - v).max() < 0.005 * np.abs(v).max()
    assert ((found - v) ** 2).sum(1).mean() == pytest.approx(qsgd_variance(v, 7), rel=0.02)


def test_qsgd_norms_are_rounded_up() -> None:
    v = np.array([1 / 3, -0.1])
    codes, norms = qsgd(v, np.full(2, 1 - 1e-12), 127)
    assert float(norms[0]) >= 1 / 3 and codes[0] == 254


def test_random_k_and_rotation_are_unbiased() -> None:
    v, k = heavy(64, 4), RandomK(0.25)
    spread = np.abs(v).max()
    mean = np.mean([k.decode(k.encode(v, draws(i)), draws(i)).numpy() for i in range(4000)], axis=0)
    assert np.abs(mean - v.astype(np.float32)).max() < 4 * spread * math.sqrt(3 / 4000)
    r, n = Rotate(1), 1024
    v = np.random.default_rng(5).normal(size=n)
    found = np.array([r.decode(r.encode(v, draws(i)), draws(i)).numpy() for i in range(300)])
    assert np.linalg.norm(found.mean(0) - v) < 0.06 * np.linalg.norm(v)  # sqrt(0.571/300) = 0.044
    error = ((found - v) ** 2).sum(1).mean() / (v @ v)
    assert error == pytest.approx(0.5708, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.05, 0.6, 1.0])
def test_what_is_not_zero_travels_and_nothing_is_lost(share: float) -> None:
    """Frames of as many bytes as the places or a bitmap take, and the values; believed no more than others."""
    d, codec, rng = 900, Nonzero(), np.random.default_rng(3)
    v = np.where(rng.random(d) < share, rng.standard_normal(d).astype(np.float32), 0).astype(np.float64)
    count = max(1, int(np.count_nonzero(v)))
    frame = to_frame(codec, v, draws())
    exact = 8 + 4 * count + min(-(-count * 10 // 8), -(-d // 8))
    assert len(frame) == min(exact, 8 + 4 * d)
    np.testing.assert_array_equal(codec.decode(frame, draws(), d=d), v)
    if exact < 8 + 4 * d:
        np.testing.assert_array_equal(codec.decode(scaled(codec, frame, 0.5), draws(), d=d), 0.5 * v)
        for wrong in (
            frame[:-1],
            frame + b"\0",
            frame[:8] + b"\xff" * (len(frame) - 8),
            bytes([1]) + frame[1:],
        ):
            with pytest.raises(ClientError):
                codec.decode(wrong, draws(), d=d)
