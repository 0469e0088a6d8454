"""The bars that the specification of the release sets on this problem, held against what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

Accuracies = Mapping[str, Mapping[int, float]] | dict[str, dict[int, float]]  # by method and seed


def bars(found: Mapping[str, Mapping[int, float]]) -> list[str]:
    """A line of Markdown for each bar whose methods were measured."""
    lines = [
        f"| {words} | {value:+.3f} | {'met' if good else 'not met'} |" if "over" in words or "below" in words
        else f"| {words} | {value:.3f} | {'met' if good else 'not met'} |"
        for words, value, good in _all(found)
    ]  # fmt: skip
    return ["| bar | measured | |", "|---|---|---|", *lines] if lines else []


def _all(found: Mapping[str, Mapping[int, float]]) -> Iterator[tuple[str, float, bool]]:
    """Words, the number, whether the bar is met."""
    mean = {name: statistics.mean(values.values()) for name, values in found.items()}
    for name, least in (("eps8", 0.90), ("eps2", 0.89), ("records8", 0.89), ("top1", 0.91)):
        if name in mean:
            yield f"`{name}` at least {least:.2f}", mean[name], mean[name] >= least
    if "local" in mean:
        yield "`local` at most 0.60", mean["local"], mean["local"] <= 0.60
    pairs = (
        ("eps2", "clipped", -0.02), ("banded2", "independent2", 0.0), ("top1", "top1_without", 0.03),
        ("sign", "sign_without", 0.03), ("qsgd8", "none", -0.02), ("qsgd4", "none", -0.02), ("rotate1", "none", -0.02),
        ("rotate4", "none", -0.02),
    )  # fmt: skip
    for a, b, least in pairs:
        if a in mean and b in mean:
            by = mean[a] - mean[b]
            words = f"`{a}` over `{b}`: at least {least:+.2f}" if least else f"`{a}` not below `{b}`"
            yield words, by, by >= least
