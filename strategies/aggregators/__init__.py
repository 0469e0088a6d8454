"""Aggregation rules: pure functions ``(updates (n, d), weights=None, **options) -> (d,)``, usable by themselves.

``updates`` is a matrix, a memory map or a list of vectors, of tensors or numpy arrays; the result is of the same kind
and type. Rows with a NaN or infinity are left out and named: in the dict given as ``report``, which also receives the
rule's diagnostics, or else by a warning. If none is left the result is zero. Impossible
arguments raise a ``RuleError``, which is a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from strategies.aggregators.averages import geometric_median, mean, norm_clip
from strategies.aggregators.coordinates import coordinate_median, meamed, phocas, trimmed_mean
from strategies.aggregators.distances import bulyan, krum, multi_krum
from strategies.aggregators.subspace import flag

Aggregator = Callable[..., Any]

__all__ = [
    "Aggregator",
    "bulyan",
    "coordinate_median",
    "flag",
    "geometric_median",
    "is_mean",
    "keeps_size",
    "krum",
    "meamed",
    "mean",
    "multi_krum",
    "norm_clip",
    "phocas",
    "trimmed_mean",
]


def is_mean(aggregator: Any) -> bool:
    """Whether ``aggregator`` is the plain mean, which workers may sum up without keeping single updates."""
    return _opened(aggregator)[0] is mean


def keeps_size(aggregator: Any) -> bool:
    """Whether results are as long as the updates are; only flag's unit scale has a length of its own."""
    rule, options = _opened(aggregator)
    return rule is not flag or options.get("scale") != "unit"


def _opened(aggregator: Any) -> tuple[Any, dict[str, Any]]:
    """The rule within partials, and its options."""
    options: dict[str, Any] = {}
    while isinstance(aggregator, partial):
        aggregator, options = aggregator.func, aggregator.keywords | options
    return aggregator, options
