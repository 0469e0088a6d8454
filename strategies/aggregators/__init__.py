"""Aggregation rules: pure functions ``(updates (n, d), weights=None, **options) -> (d,)``, usable by themselves.

``updates`` is a matrix, a memory map or a list of vectors, of tensors or numpy arrays; the result is of the same kind
and type. Rows with a NaN or infinity are left out and named: in the dict given as ``report``, which also receives the
rule's diagnostics, or else by a warning. If none is left the result is zero. A rule that tolerates ``f`` wrong updates
counts those rows, and ``removed`` ones that were left out before, among them. Impossible
arguments raise a ``RuleError``, which is a ``ValueError``; too few updates a ``TooFewError``, which is one too.
``before=["nnm"]`` mixes, averages or clips the updates first, see ``before``; ``nnm``, ``bucketing``, ``clipping`` and
``arc`` are functions ``(updates (n, d), **options) -> (r, d)`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strategies.aggregators.averages import centered_clipping, geometric_median, mean, norm_clip
from strategies.aggregators.before import arc, bucketing, clipping, nnm
from strategies.aggregators.checks import check_enough, check_options, is_mean, keeps_size, remembers
from strategies.aggregators.coordinates import coordinate_median, meamed, phocas, trimmed_mean
from strategies.aggregators.distances import bulyan, krum, monna, multi_krum
from strategies.aggregators.filtering import caf
from strategies.aggregators.subsets import mda, smea
from strategies.aggregators.subspace import flag

Aggregator = Callable[..., Any]
RULES = (
    "bulyan",
    "caf",
    "centered_clipping",
    "coordinate_median",
    "flag",
    "geometric_median",
    "krum",
    "mda",
    "meamed",
    "mean",
    "monna",
    "multi_krum",
    "norm_clip",
    "phocas",
    "smea",
    "trimmed_mean",
)

__all__ = [
    "RULES",
    "Aggregator",
    "arc",
    "bucketing",
    "bulyan",
    "caf",
    "centered_clipping",
    "check_enough",
    "check_options",
    "clipping",
    "coordinate_median",
    "flag",
    "geometric_median",
    "is_mean",
    "keeps_size",
    "krum",
    "mda",
    "meamed",
    "mean",
    "monna",
    "multi_krum",
    "nnm",
    "norm_clip",
    "phocas",
    "remembers",
    "smea",
    "trimmed_mean",
]
