"""Several settings together: verdicts counted, mean ranks, and what is asked for beside them. Accuracies are never
averaged over settings; differences are, in the bootstrap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from fedsim.errors import ConfigError
from fedsim.report.blocks import ComparisonPlan, ProblemBlock
from fedsim.report.verdict import BETTER, EQUIVALENT, LEVEL, OPPOSITE, WORSE, Comparison

FEWEST_SETTINGS = 5
ACROSS = {"bayes": FEWEST_SETTINGS, "bootstrap": 10}  # what can be asked for, and from how many settings on
DRAWS = {"bayes": 50_000, "bootstrap": 10_000}
PRIOR = 0.5  # weight of the one observation of no difference that the signed-rank test begins with


def summary(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, across: str = "") -> list[str]:
    """Lines on all settings: none for a single one. ``across``: also one of ``ACROSS``.

    Raises:
        ConfigError: if no two methods are compared in as many settings as that takes.
    """
    compared = [block for block in blocks if block.comparisons]
    asked = _asked(compared, plan, across) if across else []
    if len(compared) < 2:
        return []
    counts: dict[tuple[str, str], Counter[str]] = {}
    for block in compared:
        for c in block.comparisons:
            counts.setdefault((c.a, c.b), Counter())[c.verdict] += 1
    out = [f"over {len(compared)} settings"]
    for (a, b), found in counts.items():
        listed = ", ".join(f"{found[verdict]} {verdict}" for verdict in OPPOSITE if found[verdict])
        out.append(f"  {a} vs {b}: {listed}")
    out += _ranked(compared, plan) + asked
    sources = Counter(str(block.setting.problem.get("data._target_")) for block in compared)
    if max(sources.values()) > 1:
        out.append("  settings of one data set are not independent of each other")
    return out


def _asked(blocks: Sequence[ProblemBlock], plan: ComparisonPlan, across: str) -> list[str]:
    """A line for each pair of methods that is compared in enough settings."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for block in blocks:
        for c in block.comparisons:
            if math.isfinite(c.mean):
                pairs.setdefault((c.a, c.b), []).append(c)
    most, least = max(map(len, pairs.values()), default=0), ACROSS[across]
    if most < least:
        raise ConfigError(
            f"--across {across}: takes two methods compared in {least} settings or more; here it is {most}"
        )
    said = _said_bayes if across == "bayes" else _said_bootstrap
    return [f"  {a} vs {b}: {said(found, plan)}" for (a, b), found in pairs.items() if len(found) >= least]


def _said_bayes(found: Sequence[Comparison], plan: ComparisonPlan) -> str:
    margin = plan.limit or 0.0
    shares = signed_rank([c.mean for c in found], margin)
    within = f" within {plan.scale * margin:.3g}" if margin else ""
    names = (WORSE, EQUIVALENT + within, BETTER)
    listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(names, shares, strict=True))
    return f"Bayesian signed-rank test over {len(found)} settings: {listed}"


def _said_bootstrap(found: Sequence[Comparison], plan: ComparisonPlan) -> str:
    mean, low, high = (plan.scale * x for x in resampled([list(c.differences.values()) for c in found]))
    return (
        f"mean difference over {len(found)} settings {mean:+.3g} [{low:+.3g}, {high:+.3g}], a bootstrap of settings, "
        "then of their seeds"
    )


def signed_rank(differences: Sequence[float], margin: float) -> tuple[float, float, float]:
    """Posterior probabilities that differences lie below -``margin``, within it, and above (Benavoli et al. 2014).

    Weights of the n differences and of one prior observation of 0 are Dirichlet(1, ..., 1, ``PRIOR``); in each draw the
    sums of two differences beyond twice the margin are counted with both weights, and the largest count wins.
    """
    z = np.array([*differences, 0.0])
    weights = np.random.default_rng(0).dirichlet([*[1.0] * (len(z) - 1), PRIOR], DRAWS["bayes"])
    sums = z[:, None] + z  # (n + 1, n + 1)
    below, above = (
        (((weights @ beyond) * weights).sum(1)) for beyond in (sums < -2 * margin, sums > 2 * margin)
    )
    wins = np.bincount(np.argmax([below, 1 - below - above, above], axis=0), minlength=3) / len(weights)
    return float(wins[0]), float(wins[1]), float(wins[2])


def resampled(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean over settings of the mean difference over seeds, and the 95 % interval of a hierarchical bootstrap.

    Each of its draws takes settings with replacement, and of each of them as many seeds as it has, with replacement.
    """
    counts = np.array([len(d) for d in differences])
    table = np.zeros((len(counts), counts.max()))
    for row, d in zip(table, differences, strict=True):
        row[: len(d)] = d
    rng, draws = np.random.default_rng(0), DRAWS["bootstrap"]
    total = np.zeros(draws)
    for _ in counts:
        setting = rng.integers(0, len(counts), draws)
        n = counts[setting][:, None]
        seeds = (rng.random((draws, table.shape[1])) * n).astype(np.int64)
        there = np.arange(table.shape[1]) < n
        total += (table[setting[:, None], seeds] * there).sum(1) / n[:, 0]
    low, high = np.percentile(total / len(counts), [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return fmean(fmean(d) for d in differences), float(low), float(high)


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
    listed = ", ".join(f"{names[at]} {mean[at]:.2f}" for at in np.argsort(mean, kind="stable"))
    return [
        f"  mean ranks: {listed}",
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
