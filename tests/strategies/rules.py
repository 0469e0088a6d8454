"""The robust rules as the tests try them, each with two wrong updates to tolerate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from strategies.aggregators import (
    bulyan,
    coordinate_median,
    flag,
    geometric_median,
    krum,
    meamed,
    mean,
    multi_krum,
    norm_clip,
    phocas,
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
    "flag": flag,
    "flag_unit": partial(flag, scale="unit"),
    "flag_pairs": partial(flag, scale="raw", lam=3.0, pairs="paper"),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
