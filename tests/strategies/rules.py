"""The robust rules as the tests try them, each with two wrong updates to tolerate; updates to try them on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from problems import GOLDEN

from strategies.aggregators import (
    bulyan,
    caf,
    coordinate_median,
    flag,
    geometric_median,
    krum,
    mda,
    meamed,
    mean,
    multi_krum,
    norm_clip,
    phocas,
    smea,
    trimmed_mean,
)

RULES: dict[str, Callable[..., Any]] = {
    "mean": mean,
    "coordinate_median": coordinate_median,
    "trimmed_mean": partial(trimmed_mean, f=2),
    "meamed": partial(meamed, f=2),
    "phocas": partial(phocas, f=2),
    "krum": partial(krum, f=2),
    "multi_krum": partial(multi_krum, f=2),
    "bulyan": partial(bulyan, f=2),
    "bulyan_garfield": partial(bulyan, f=2, variant="garfield"),
    "geometric_median": geometric_median,
    "norm_clip": norm_clip,
    "mda": partial(mda, f=2),
    "smea": partial(smea, f=2),
    "caf": partial(caf, f=2),
    "mixed_median": partial(coordinate_median, before=[{"nnm": {"f": 2}}]),
    "flag": flag,
    "flag_unit": partial(flag, scale="unit"),
    "flag_pairs": partial(flag, scale="raw", lam=3.0, pairs="paper"),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"flag/{name}.npz") as z:
        return dict(z)


def draw(n: int = 11, d: int = 40, seed: int = 0, common: float = 1.0) -> np.ndarray:
    """Updates with a common part, of different lengths, one of them hostile."""
    rng = np.random.default_rng(seed)
    u = common * rng.normal(size=d) + rng.normal(size=(n, d))
    u *= rng.uniform(0.3, 3, size=(n, 1))
    u[0] = -10 * u[0]
    return u
