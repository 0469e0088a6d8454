"""Aggregation rules: pure functions ``(updates (n, d), weights=None, **options) -> (d,)``, usable by themselves.

``updates`` is a matrix, a memory map or a list of vectors, of tensors or numpy arrays; the result is of the same kind
and type. Rows with a NaN or infinity are left out and named: in the dict given as ``report``, which also receives the
rule's diagnostics, or else by a warning. If none is left the result is zero. A rule that tolerates ``f`` wrong updates
counts those rows, and ``removed`` ones that were left out before, among them. Impossible
arguments raise a ``RuleError``, which is a ``ValueError``; too few updates a ``TooFewError``, which is one too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedsim.errors import ConfigError
from strategies.aggregators.averages import geometric_median, mean, norm_clip
from strategies.aggregators.coordinates import coordinate_median, meamed, phocas, trimmed_mean
from strategies.aggregators.distances import bulyan, krum, multi_krum
from strategies.aggregators.rows import NEEDED, whole
from strategies.aggregators.subspace import flag

Aggregator = Callable[..., Any]

__all__ = [
    "Aggregator",
    "bulyan",
    "check_enough",
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


def check_enough(aggregator: Any, size: int, given: str, ask: Callable[[int], str]) -> None:
    """Refuse a rule for which ``size`` updates are too few.

    Args:
        aggregator: any; only what the rules of this package need is known.
        size: updates at once, if nobody fails.
        given: the setting that says so, with its value.
        ask: what to type to have a number of updates, or nothing.

    Raises:
        ConfigError: naming both settings and the least that would do.
    """
    rule, options = _opened(aggregator)
    name = getattr(rule, "__name__", "")
    if globals().get(name) is not rule:
        return
    needs, lower = list[tuple[int, str]](), ""
    if options.get("m") is not None and name == "multi_krum":
        m = whole(name, "m", options["m"], 1, "the updates averaged")
        needs, lower = [(m, f"aggregator.m={m}: {name} averages {m} updates")], f"aggregator.m={size}"
    if name in NEEDED and "f" in options:
        f, (slope, offset) = whole(name, "f", options["f"], 0, "the wrong updates to tolerate"), NEEDED[name]
        needs.append(
            (n := slope * f + offset, f"aggregator.f={f}: {name} needs {slope}f + {offset} = {n} updates")
        )
        if n > size:
            able = (size - offset) // slope
            lower = f"aggregator.f={able}" if able >= 0 else ""
    least, why = max(needs, default=(0, ""))
    if least > size:
        ways = " or ".join(way for way in (ask(least), lower) if way) or "another aggregator"
        raise ConfigError(f"{why}, {given} gives {size}; type {ways}")


def _opened(aggregator: Any) -> tuple[Any, dict[str, Any]]:
    """The rule within partials, and its options."""
    options: dict[str, Any] = {}
    while isinstance(aggregator, partial):
        aggregator, options = aggregator.func, aggregator.keywords | options
    return aggregator, options
