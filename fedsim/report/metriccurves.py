"""Single curves that ``--curves`` asks for: a column of the rows, or differences to the reference, against rounds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy import special

from fedsim.errors import ConfigError, hint
from fedsim.report.arms import Arm
from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.curves import Curves, image, looks, one_panel, panel, titled

DIFF = "diff"


def file_of(metric: str) -> str:
    """``curve-clients-accuracy.png``."""
    return f"curve-{re.sub(r'[^A-Za-z0-9_]+', '-', metric)}.png"


def draw_metric(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, metric: str) -> bytes:
    """A picture (.png): means over seeds with a band of one standard deviation; the objective's rounds are shaded.

    ``diff``: the objective's differences to the reference at each round that all common seeds measured, with 95 %
    intervals.

    Raises:
        ConfigError: if no run has the metric.
    """
    if metric == DIFF:
        return image(_differences(blocks, plan), "png", dpi=150)
    rows = [
        row for block in blocks for arm in block.setting.arms for run in arm.group.runs for row in run.rows
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    if metric not in names:
        raise ConfigError(f"--curves {metric}: no such column{hint(metric, [DIFF, *names])}")
    histories = {
        _label(arm, blocks, block): [run.rows for run in arm.group.runs]
        for block in blocks
        for arm in block.setting.arms
    }
    figure = panel(histories, metric)
    if metric == plan.objective.column and plan.objective.at.startswith("mean"):
        _shade(figure.axes[0], [arm for block in blocks for arm in block.ranked])
    titled(figure)
    return image(figure, "png", dpi=150)


def _label(arm: Arm, blocks: Sequence[ProblemBlock], block: ProblemBlock) -> str:
    where = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in block.setting.differing.items())
    inside = f", {where}" if len(blocks) > 1 and where else ""
    return f"{arm.name}{inside} (n={len(arm.group.runs)})"


def _shade(axes: Axes, arms: Sequence[Arm]) -> None:
    """The rounds that the number of a run is made of."""
    used = [number.rounds for arm in arms for number in arm.numbers.values() if len(number.rounds) > 1]
    if used:
        axes.axvspan(
            min(r[0] for r in used), max(r[-1] for r in used), color="#000000", alpha=0.06, linewidth=0
        )


def _differences(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> Curves:
    figure, axes = one_panel()
    style = looks()
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
            colour, dash = next(style)
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
