"""Codecs, draws and vectors that several tests use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from fedsim.exchange.codecs import QSGD, FrameCodec, LowRank, RandomK, Rotate, Sign, StageDraws, TopK
from fedsim.rng import torch_rng

SHAPES = ((64, 64), (64,), (10, 64), (10,))  # of the multilayer perceptron with 4810 weights
CODECS: Mapping[str, FrameCodec] = {
    "top_k": TopK(0.1),
    "top_k_bitmap": TopK(0.5),
    "random_k": RandomK(0.1),
    "random_k_contractive": RandomK(0.1, "contractive"),
    "qsgd": QSGD(7, "max", 64),
    "qsgd_l2": QSGD(1, "l2", 0),
    "sign": Sign(),
    "rotate": Rotate(1),
    "rotate_3": Rotate(3, "least"),
    "low_rank": LowRank(2),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


def draws(*numbers: int) -> StageDraws:
    return StageDraws(lambda stage: torch_rng(1, f"test/{stage}", *numbers))


def heavy(d: int = 4810, seed: int = 0) -> np.ndarray:
    """A vector most of whose length lies in few entries, as updates are."""
    return np.random.default_rng(seed).standard_t(2.5, d)
