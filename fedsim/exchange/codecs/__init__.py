"""Codecs: one vector to the frame that travels, and back; options and bytes: docs/compression.md."""

from __future__ import annotations

from fedsim.exchange.codecs.bitstream import pack_bits, stream_bytes, unpack_bits
from fedsim.exchange.codecs.codec import CodecDraws, FrameCodec, StageDraws, fit, scaled, to_frame
from fedsim.exchange.codecs.feedback import compensated, remainder
from fedsim.exchange.codecs.framing import FrameHeader, compressed, float32_frame, uncompressed
from fedsim.exchange.codecs.half import Float16
from fedsim.exchange.codecs.levels import QSGD, Sign, qsgd, qsgd_decoded, qsgd_variance, sign, sign_decoded
from fedsim.exchange.codecs.powersgd import LowRank, low_rank, low_rank_decoded
from fedsim.exchange.codecs.rotation import (
    CENTROIDS,
    Rotate,
    hadamard,
    rotated,
    rotation_codes,
    rotation_decoded,
    unrotated,
)
from fedsim.exchange.codecs.sparse import (
    Nonzero,
    RandomK,
    TopK,
    kept,
    random_k,
    read_top_k,
    top_k,
    top_k_frame,
)

__all__ = [
    "CENTROIDS",
    "QSGD",
    "CodecDraws",
    "Float16",
    "FrameCodec",
    "FrameHeader",
    "LowRank",
    "Nonzero",
    "RandomK",
    "Rotate",
    "Sign",
    "StageDraws",
    "TopK",
    "compensated",
    "compressed",
    "fit",
    "float32_frame",
    "hadamard",
    "kept",
    "low_rank",
    "low_rank_decoded",
    "pack_bits",
    "qsgd",
    "qsgd_decoded",
    "qsgd_variance",
    "random_k",
    "read_top_k",
    "remainder",
    "rotated",
    "rotation_codes",
    "rotation_decoded",
    "scaled",
    "sign",
    "sign_decoded",
    "stream_bytes",
    "to_frame",
    "top_k",
    "top_k_frame",
    "uncompressed",
    "unpack_bits",
    "unrotated",
]
