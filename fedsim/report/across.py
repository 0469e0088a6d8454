"""Several settings together: verdicts counted, and from five settings on mean ranks. Accuracies are never averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.verdict import LEVEL, OPPOSITE

FEWEST_SETTINGS = 5


def summary(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> list[str]:
    """Lines on all settings: none for a single one."""
    compared = [block for block in blocks if block.comparisons]
    if len(compared) < 2:
        return []
    counts: dict[tuple[str, str], Counter[str]] = {}
    for block in compared:
        for c in block.comparisons:
            counts.setdefault((c.a, c.b), Counter())[c.verdict] += 1
    out = [f"over {len(compared)} settings"]
    for (a, b), found in counts.items():
        told = ", ".join(f"{found[verdict]} {verdict}" for verdict in OPPOSITE if found[verdict])
        out.append(f"  {a} vs {b}: {told}")
    out += _ranked(compared, plan)
    sources = Counter(str(block.setting.problem.get("data._target_")) for block in compared)
    if max(sources.values()) > 1:
        out.append("  settings of one data set are not independent of each other")
    return out


def _ranked(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> list[str]:
    """Mean ranks with the Friedman test (Iman, Davenport 1980) and Nemenyi's critical difference (Demsar 2006)."""
    means = [
        {
            arm.name: plan.objective.sign * fmean(v)
            for arm in block.ranked
            if (v := _finite(arm.values.values()))
        }
        for block in blocks
    ]
    names = sorted(set.intersection(*(set(found) for found in means)))
    n, k = len(means), len(names)
    if n < FEWEST_SETTINGS or k < 3:
        return []
    from scipy import stats

    ranks = stats.rankdata(
        [[-found[name] for name in names] for found in means], axis=1
    )  # (n, k), 1 the best
    mean, f, p = friedman(ranks)
    critical = (
        float(stats.studentized_range.ppf(1 - LEVEL, k, np.inf))
        / math.sqrt(2)
        * math.sqrt(k * (k + 1) / (6 * n))
    )
    told = ", ".join(f"{names[at]} {mean[at]:.2f}" for at in np.argsort(mean, kind="stable"))
    return [
        f"  mean ranks: {told}",
        f"  Friedman F({k - 1}, {(k - 1) * (n - 1)}) = {f:.2f}, p = {p:.3g}; ranks closer than {critical:.2f} "
        "(Nemenyi) are not told apart",
    ]


def friedman(ranks: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean ranks (k,) of ``ranks`` (n, k), the statistic in Iman and Davenport's form, and its p."""
    from scipy import stats

    n, k = ranks.shape
    mean = ranks.mean(axis=0)
    chi = 12 * n / (k * (k + 1)) * (float((mean**2).sum()) - k * (k + 1) ** 2 / 4)
    f = (n - 1) * chi / (n * (k - 1) - chi) if chi < n * (k - 1) else math.inf
    return mean, f, float(stats.f.sf(f, k - 1, (k - 1) * (n - 1)))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
