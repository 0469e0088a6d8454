"""Whether one method is better than another, from their numbers on common seeds. Pure: numbers in, words out.

Paired t test with a floor under the standard deviation, two one-sided tests against a margin, Holm's adjustment over
a family of comparisons. Error rates of these and of what was not chosen: docs/comparing.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.05
POWER = 0.8
FEWEST = 3  # seeds of a verdict
MOST = 100  # seeds that are worth naming; more are said as "> 100"
EXACT_FLIPS, DRAWN_FLIPS = 16, 100_000
TIE = 1e-12
OUTLIER = 10  # times the median |d|: one seed decides

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
OPPOSITE = {BETTER: WORSE, WORSE: BETTER, EQUIVALENT: EQUIVALENT, UNDECIDED: UNDECIDED}


@dataclass(frozen=True)
class Comparison:
    """``a`` against ``b``: d = a - b per seed (b - a where less is better); what is not known is NaN."""

    a: str
    b: str
    seeds: tuple[int, ...]  # on which both are done, with those whose numbers are not finite
    differences: Mapping[int, float]  # by seed, the finite ones: all numbers below are of these
    mean: float
    sd: float  # sample standard deviation of d, not below the floor
    low: float  # of the 95 % interval of the mean, unadjusted
    high: float
    p: float  # of the paired t test, two-sided
    p_holm: float  # adjusted over the family
    p_flip: float  # of sign flips
    margin: float | None
    verdict: str = UNDECIDED
    reason: str | None = None  # of a verdict that is no test's
    seeds_needed: int | None = None  # that would decide; 101: more than 100
    notes: tuple[str, ...] = ()
    error: float = math.nan  # standard error of the mean
    df: float = math.nan  # degrees of freedom of the test

    @property
    def n(self) -> int:
        """Seeds that the numbers are of."""
        return len(self.differences)


class Paired(NamedTuple):
    """Statistics of differences (..., n) over their last axis."""

    mean: np.ndarray
    sd: np.ndarray  # with n - 1, not below the floor
    error: np.ndarray  # standard error of the mean
    p: np.ndarray  # two-sided


def paired(d: np.ndarray, floor: float = 0.0) -> Paired:
    """Paired t test of differences ``d`` (..., n), n >= 2. A spread of exactly 0 decides, or there is no difference."""
    n = d.shape[-1]
    mean = d.mean(axis=-1)
    sd = np.maximum(d.std(axis=-1, ddof=1), floor)
    error = sd / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    return Paired(mean, sd, error, 2 * special.stdtr(n - 1, -t))


def floor_of(samples: int | None, k: int) -> float:
    """Standard deviation of the difference of two means of ``k`` accuracies, each rounded to 1/``samples``."""
    return 1 / (samples * math.sqrt(k) * math.sqrt(6)) if samples else 0.0


def sign_flips(d: Sequence[float] | np.ndarray) -> float:
    """p of all 2^n signs of ``d``, by |sum|; above 16 differences of 100 000 drawn ones and the observed."""
    values = np.asarray(d, dtype=float)
    if not len(values):
        return math.nan
    if len(values) > EXACT_FLIPS:
        signs = np.random.default_rng(0).integers(0, 2, (DRAWN_FLIPS, len(values)), dtype=np.int8) * 2 - 1
        hits = int((np.abs(signs @ values) >= abs(float(values.sum())) - TIE).sum())
        return (hits + 1) / (DRAWN_FLIPS + 1)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= abs(sums[0]) - TIE).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; NaN (no test) takes no part."""
    known = sorted((value, at) for at, value in enumerate(p) if not math.isnan(value))
    out, so_far = [math.nan] * len(p), 0.0
    for rank, (value, at) in enumerate(known):
        so_far = max(so_far, min(1.0, (len(known) - rank) * value))
        out[at] = so_far
    return out


def decide(found: Paired, df: float, p_holm: Any, margin: float | None) -> np.ndarray:
    """Verdicts of finite differences of 3 or more seeds: equivalence within ``margin`` first, then the adjusted p."""
    reach = special.stdtrit(df, 1 - LEVEL) * found.error
    limit = -1.0 if margin is None else margin
    inside = np.abs(found.mean) + reach < limit
    significant = np.asarray(p_holm) < LEVEL
    return np.select(
        [inside, significant & (found.mean > 0), significant & (found.mean < 0)],
        [EQUIVALENT, BETTER, WORSE],
        UNDECIDED,
    )


def seeds_needed(difference: float, sd: float) -> int:
    """Least number of seeds by which a paired t test finds ``difference`` with power .8; 101 stands for more than 100.

    Power of the two-sided test at level .05, by the noncentral t distribution.
    """
    if sd == 0 or difference == 0:
        return FEWEST if difference else MOST + 1
    n = np.arange(FEWEST, MOST + 1)
    shift, limit = abs(difference) / sd * np.sqrt(n), special.stdtrit(n - 1, 1 - LEVEL / 2)
    power = 1 - special.nctdtr(n - 1, shift, limit) + special.nctdtr(n - 1, shift, -limit)
    enough = np.flatnonzero(np.nan_to_num(power, nan=1.0) >= POWER)
    return int(n[enough[0]]) if len(enough) else MOST + 1


def pair(
    a: tuple[str, Mapping[int, float]],
    b: tuple[str, Mapping[int, float]],
    *,
    sign: int = 1,
    margin: float | None = None,
    floor: float = 0.0,
    interval: Callable[[np.ndarray], tuple[float, float]] | None = None,
    samples: np.ndarray | None = None,
) -> Comparison:
    """Two methods' numbers by seed, not yet judged: that takes the whole family, see :func:`judge`.

    Args:
        a: name, and number by seed of the finished runs; NaN or infinite where it is not finite.
        b: the reference's.
        sign: 1 if more is better, -1 if less is.
        margin: differences within which methods count as equivalent; ``None``: none do.
        floor: under the standard deviation, see :func:`floor_of`.
        interval: low and high end from the differences, in place of the t interval.
        samples: difference (N,) of each test sample, meaned over the seeds: the test is then over new samples too, with
            the variance s^2/n + var(samples)/N and Satterthwaite's degrees of freedom.
    """
    (name, ours), (other, theirs) = a, b
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    finite = [s for s in seeds if math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    d = {seed: sign * (ours[seed] - theirs[seed]) for seed in finite}
    values = np.array(list(d.values()))
    mean = sd = low = high = p = error = df = math.nan
    if len(values):
        mean = float(values.mean())
    if len(values) > 1:
        found = paired(values, floor)
        sd, p, error, df = float(found.sd), float(found.p), float(found.error), len(values) - 1.0
        if samples is not None:
            error, df, p = over_samples(mean, error, df, samples)
        reach = float(special.stdtrit(df, 1 - LEVEL / 2)) * error
        low, high = (mean - reach, mean + reach) if interval is None else interval(values)
    numbers = (mean, sd, low, high, p, math.nan, sign_flips(values), margin)
    out = Comparison(name, other, seeds, d, *numbers, error=error, df=df)
    lost = {"a": [s for s in seeds if not math.isfinite(ours[s])]}
    lost["b"] = [s for s in seeds if not math.isfinite(theirs[s])]
    if not (lost["a"] or lost["b"]):
        return out
    reason = f"not finite: {len(seeds) - len(finite)} of {len(seeds)} seeds"
    verdict = UNDECIDED
    if len(seeds) >= FEWEST and len(lost["a"]) == len(seeds) and not lost["b"]:
        verdict = WORSE
    elif len(seeds) >= FEWEST and len(lost["b"]) == len(seeds) and not lost["a"]:
        verdict = BETTER
    whose = "; ".join(
        f"{who} not finite on seed {', '.join(map(str, missing))}"
        for who, missing in ((name, lost["a"]), (other, lost["b"]))
        if missing
    )
    return replace(out, verdict=verdict, reason=reason, notes=(whose,))


def over_samples(mean: float, error: float, df: float, samples: np.ndarray) -> tuple[float, float, float]:
    """Standard error, degrees of freedom and p where the test samples (N,) are drawn at random as the seeds are."""
    seeds, drawn = error**2, float(samples.var(ddof=1)) / len(samples)
    both = math.sqrt(seeds + drawn)
    if both == 0:
        return 0.0, df, 1.0 if mean == 0 else 0.0
    freedom = both**4 / (seeds**2 / df + drawn**2 / (len(samples) - 1))
    return both, freedom, float(2 * special.stdtr(freedom, -abs(mean) / both))


def judge(
    family: Sequence[Comparison], identical: Sequence[bool] = (), scale: float = 1.0
) -> list[Comparison]:
    """Verdicts of the comparisons that are made together, in one setting: the adjustment is over them.

    Args:
        family: from :func:`pair`.
        identical: whether the weights of a comparison's runs are the same, bit for bit.
        scale: of differences that notes name (100: in points of percent).
    """
    adjusted = holm([c.p for c in family])
    same = [*identical, *[False] * (len(family) - len(identical))]
    return [
        _judged(replace(c, p_holm=p), bits, scale) for c, p, bits in zip(family, adjusted, same, strict=True)
    ]


def _judged(c: Comparison, identical: bool, scale: float) -> Comparison:
    notes = (*c.notes, *_notes(c, scale))
    if len(c.seeds) < FEWEST:
        count = f"{len(c.seeds)} common seed{'s' * (len(c.seeds) != 1)}, of at least {FEWEST}"
        return replace(c, verdict=UNDECIDED, reason=c.reason or count, notes=notes)
    if c.reason is not None:  # not finite
        return replace(c, notes=notes)
    values = np.array(list(c.differences.values()))
    if identical and not values.any():
        return replace(c, verdict=EQUIVALENT, reason="identical bits", notes=notes)
    found = Paired(*map(np.asarray, (c.mean, c.sd, c.error, c.p)))
    verdict = str(decide(found, c.df, c.p_holm, c.margin))
    needed = seeds_needed(max(abs(c.mean), c.margin or 0.0), c.sd) if verdict == UNDECIDED else None
    return replace(c, verdict=verdict, seeds_needed=needed, notes=notes)


def _notes(c: Comparison, scale: float) -> list[str]:
    """What a reader should know of the differences."""
    out = []
    if c.n >= FEWEST:
        seed, largest = max(c.differences.items(), key=lambda item: abs(item[1]))
        if abs(largest) > OUTLIER * float(np.median(np.abs(list(c.differences.values())))):
            out.append(f"one seed decides: seed {seed}, {scale * largest:+.1f}")
    if len(c.seeds) == FEWEST:
        out.append("3 seeds: only large differences can be found")
    return out


def swapped(c: Comparison) -> Comparison:
    """``b`` against ``a``."""
    return replace(
        c,
        a=c.b,
        b=c.a,
        differences={seed: -value for seed, value in c.differences.items()},
        mean=-c.mean,
        low=-c.high,
        high=-c.low,
        verdict=OPPOSITE[c.verdict],
    )


def bca(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval (bias-corrected, accelerated) of the mean: far too narrow below 20 seeds."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=10_000,
        confidence_level=1 - LEVEL,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
