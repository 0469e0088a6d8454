"""Single figures that ``--curves`` asks for: a column of the rows, or differences to the reference, against rounds; the
objective against a setting that was swept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import special

from fedsim.errors import ConfigError, hint
from fedsim.report.arms import Arm
from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.curves import Curves, image, looks, one_panel, panel, titled
from fedsim.report.runs import short_name, short_value

DIFF = "diff"


def file_of(metric: str) -> str:
    """``curve-clients-accuracy.png``."""
    return f"curve-{re.sub(r'[^A-Za-z0-9_]+', '-', metric)}.png"


def draw_metric(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, metric: str) -> bytes:
    """The picture (.png) of :func:`figure_of_metric`."""
    return image(figure_of_metric(blocks, plan, metric), "png", dpi=150)


def figure_of_metric(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, metric: str) -> Curves:
    """Means over seeds with a band of one standard deviation; the objective's rounds are shaded.

    ``diff``: the objective's differences to the reference at each round that all common seeds measured, with 95 %
    intervals. A setting of numbers in which runs differ, such as ``client.lr``: the objective against it.

    Raises:
        ConfigError: if no run has the metric, and runs do not differ in such a setting.
    """
    if metric == DIFF:
        return _differences(blocks, plan)
    rows = [
        row for block in blocks for arm in block.setting.arms for run in arm.group.runs for row in run.rows
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    if metric not in names:
        swept = _swept(blocks)
        fitting = [key for key in swept if key == metric] or [k for k in swept if short_name(k) == metric]
        if len(fitting) == 1:
            return _against_setting(blocks, plan, fitting[0])
        near = f"; there are {', '.join(fitting)}" if fitting else hint(metric, [DIFF, *names, *swept])
        raise ConfigError(f"--curves {metric}: no such column, nor one setting in which runs differ{near}")
    histories = {
        _label(arm, blocks, block): [run.rows for run in arm.group.runs]
        for block in blocks
        for arm in block.setting.arms
    }
    figure = panel(histories, metric)
    figure.axes[0].set_ylabel(metric, parse_math=False)
    if metric == plan.objective.column and plan.objective.at.startswith("mean"):
        _shade(figure.axes[0], [arm for block in blocks for arm in block.ranked])
    titled(figure)
    return figure


def _label(arm: Arm, blocks: Sequence[ProblemBlock], block: ProblemBlock) -> str:
    where = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in block.setting.differing.items())
    inside = f", {where}" if len(blocks) > 1 and where else ""
    return f"{arm.name}{inside} (n={len(arm.group.runs)})"


def _styles(blocks: Sequence[ProblemBlock]) -> dict[int, tuple[str, str]]:
    """Colour and dash of each arm, by its identity, in the order of the table: the same in all figures of a report."""
    arms = [arm for block in blocks for arm in block.setting.arms]
    return {id(arm): look for arm, look in zip(arms, looks(), strict=False)}


def _shade(axes: Axes, arms: Sequence[Arm]) -> None:
    """The rounds that the number of a run is made of."""
    used = [number.rounds for arm in arms for number in arm.numbers.values() if len(number.rounds) > 1]
    if used:
        axes.axvspan(
            min(r[0] for r in used), max(r[-1] for r in used), color="#000000", alpha=0.06, linewidth=0
        )


def _settings(block: ProblemBlock, arm: Arm) -> Mapping[str, Any]:
    return {**block.setting.differing, **arm.group.settings}


def _swept(blocks: Sequence[ProblemBlock]) -> list[str]:
    """Settings whose values are numbers, several of them."""
    values: dict[str, set[float]] = {}
    for block in blocks:
        for arm in block.ranked:
            for key, value in _settings(block, arm).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    values.setdefault(key, set()).add(value)
    return sorted(key for key, found in values.items() if len(found) > 1)


def _against_setting(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, key: str) -> Curves:
    """The objective's mean over seeds against the values of ``key``, with bars of one standard deviation to each side;
    a curve per combination of the other settings."""
    curves: dict[str, dict[float, list[float]]] = {}
    first: dict[str, tuple[str, str]] = {}  # how a curve's first arm looks in all figures
    style = _styles(blocks)
    for block in blocks:
        for arm in block.ranked:
            settings = dict(_settings(block, arm))
            at = settings.pop(key, None)
            values = [plan.scale * value for value in arm.values.values() if math.isfinite(value)]
            if isinstance(at, int | float) and values:
                others = [f"{short_name(k)}={short_value(k, v)}" for k, v in settings.items()]
                label = ", ".join([arm.group.method, *others])
                curves.setdefault(label, {})[float(at)] = values
                first.setdefault(label, style[id(arm)])
    figure, axes = one_panel()
    places = sorted({at for found in curves.values() for at in found})
    if places and 0 < 10 * places[0] <= places[-1]:
        axes.set_xscale("log")
    for label, found in curves.items():
        (colour, dash), x = first[label], sorted(found)
        bars = [stdev(found[at]) if len(found[at]) > 1 else 0.0 for at in x]
        look: dict[str, Any] = {
            "color": colour,
            "linestyle": dash,
            "marker": "o",
            "markersize": 4,
            "capsize": 3,
        }
        axes.errorbar(x, [fmean(found[at]) for at in x], yerr=bars, label=label, linewidth=1.8, **look)
    if len(places) <= 12:
        axes.set_xticks(places, [f"{at:g}" for at in places])
        axes.minorticks_off()
    axes.set(xlabel=short_name(key), ylabel=f"{plan.objective.column}{', %' * plan.objective.share}")
    titled(figure)
    return figure


def _differences(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> Curves:
    figure, axes = one_panel()
    style = _styles(blocks)
    for block in blocks:
        arms = {arm.name: arm for arm in block.ranked}
        for c in block.comparisons:
            a, b = (
                [arms[name].runs[seed].series(plan.objective.column) for seed in c.seeds]
                for name in (c.a, c.b)
            )
            rounds = sorted(set.intersection(*(set(one) for one in (*a, *b)))) if a else []
            if not rounds:
                continue
            d = np.array(
                [[plan.objective.sign * (x[r] - y[r]) for r in rounds] for x, y in zip(a, b, strict=True)]
            )
            colour, dash = style[id(arms[c.a])]
            name = f"{_label(arms[c.a], blocks, block)} - {c.b}"
            axes.plot(
                rounds, plan.scale * d.mean(axis=0), color=colour, linestyle=dash, label=name, linewidth=1.8
            )
            if len(d) > 1:
                t = float(special.stdtrit(len(d) - 1, 0.975)) / math.sqrt(len(d))
                half, mean = t * d.std(axis=0, ddof=1), d.mean(axis=0)
                low, high = plan.scale * (mean - half), plan.scale * (mean + half)
                axes.fill_between(rounds, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set(
        xlabel="round", ylabel=f"difference in {plan.objective.column}{', points' * plan.objective.share}"
    )
    titled(figure)
    return figure
