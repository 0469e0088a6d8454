"""What can be told of a configured rule before anything starts: whether it is the plain mean, and whether updates are
enough for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from fedsim.errors import ConfigError
from strategies.aggregators.averages import mean
from strategies.aggregators.before import stages
from strategies.aggregators.rows import NEEDED, whole
from strategies.aggregators.subsets import too_many
from strategies.aggregators.subspace import flag

HOME = __name__.rpartition(".")[0]


def is_mean(aggregator: Any) -> bool:
    """Whether ``aggregator`` is the plain mean, which workers may sum up without keeping single updates."""
    rule, options = _opened(aggregator)
    return rule is mean and not options.get("before")


def keeps_size(aggregator: Any) -> bool:
    """Whether results are as long as the updates are; only flag's unit scale has a length of its own."""
    rule, options = _opened(aggregator)
    return rule is not flag or options.get("scale") != "unit"


def remembers(aggregator: Any) -> bool:
    """Whether a rule goes on from its last result, which it takes as ``centre``."""
    try:
        return "centre" in signature(aggregator).parameters
    except (TypeError, ValueError):  # no signature to be had
        return False


def check_options(aggregator: Any) -> None:
    """Refuse what a rule of this package is to be preceded by, if that is nothing known."""
    rule, options = _opened(aggregator)
    if _named(rule):
        stages(options.get("before", ()), options.get("f"))


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
    if not (name := _named(rule)):
        return
    there, width = size, 1  # rows left for the rule, and updates that each stands for
    for stage, found in stages(options.get("before", ()), options.get("f")):
        if stage in NEEDED:
            _refuse(_needs(stage, found["f"], "aggregator.before"), there, width, given, ask)
        if stage == "bucketing":
            there, width = -(-there // found["s"]), width * found["s"]
    needs, lower = list[tuple[int, str]](), ""
    if options.get("m") is not None and name == "multi_krum":
        m = whole(name, "m", options["m"], 1, "the updates averaged")
        needs, lower = [(m, f"aggregator.m={m}: {name} averages {m} updates")], f"aggregator.m={there}"
    if name in NEEDED and "f" in options:
        form = f"{name} variant={options.get('variant')}"
        bound = form if form in NEEDED else name
        needs.append(_needs(bound, options["f"], "aggregator.f"))
        slope, offset = NEEDED[bound]
        if needs[-1][0] > there:
            able = (there - offset) // slope
            lower = f"aggregator.f={able}" if able >= 0 else ""
    if name == "monna":
        idx = whole(name, "idx", options.get("idx", 0), 0, "the position of the trusted update")
        needs.append((idx + 1, f"aggregator.idx={idx}: {name} trusts update {idx}, from 0"))
    _refuse(max(needs, default=(0, "")), there, width, given, ask, lower)
    if name == "smea" and (
        refused := too_many(there, whole(name, "f", options.get("f", 0), 0, "wrong ones"))
    ):
        raise ConfigError(f"aggregator.f: {refused}; type a smaller aggregator.f, or aggregator=caf")


def _needs(name: str, f: Any, key: str) -> tuple[int, str]:
    """The updates that a rule or stage needs at least, and why."""
    f, (slope, offset) = whole(name, "f", f, 0, "the wrong updates to tolerate"), NEEDED[name]
    n = slope * f + offset
    where = f"{key}={f}" if key.endswith(".f") else f"{key}, f={f}"
    times = "" if slope == 1 else str(slope)
    return n, f"{where}: {name} needs {times}f + {offset} = {n} updates"


def _refuse(
    need: tuple[int, str], there: int, width: int, given: str, ask: Callable[[int], str], lower: str = ""
) -> None:
    """Refuse if ``there`` are fewer rows, of up to ``width`` updates each, than needed."""
    least, why = need
    if least > there:
        ways = (
            " or ".join(way for way in (ask((least - 1) * width + 1), lower) if way) or "another aggregator"
        )
        gives = f"{given} gives {there}" + (f" buckets of {width}" if width > 1 else "")
        raise ConfigError(f"{why}, {gives}; type {ways}")


def _named(rule: Any) -> str:
    """The name of a rule of this package; empty for any other."""
    own = callable(rule) and str(getattr(rule, "__module__", "")).startswith(f"{HOME}.")
    return str(getattr(rule, "__name__", "")) if own else ""


def _opened(aggregator: Any) -> tuple[Any, dict[str, Any]]:
    """The rule within partials, and its options."""
    options: dict[str, Any] = {}
    while isinstance(aggregator, partial):
        aggregator, options = aggregator.func, aggregator.keywords | options
    return aggregator, options
