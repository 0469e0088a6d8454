"""Verdicts from paired numbers: by hand, by independent code, by properties, and by their error rates."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsim.report.verdict import (
    OPPOSITE,
    bca,
    decide,
    floor_of,
    holm,
    judge,
    pair,
    paired,
    seeds_needed,
    sign_flips,
)


def one(a, b, **options):
    (found,) = judge([pair(("a", dict(enumerate(a))), ("b", dict(enumerate(b))), **options)])
    return found


def test_a_comparison_by_hand():
    a, b = [0.912, 0.905, 0.921, 0.899, 0.915], [0.893, 0.896, 0.897, 0.884, 0.894]
    d = np.subtract(a, b)
    found = one(a, b, margin=0.005)
    assert found.mean == pytest.approx(0.0176) and found.n == 5
    test = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(test.confidence_interval(0.95), abs=1e-12)
    assert found.sd == pytest.approx(np.std(d, ddof=1))
    assert found.p_flip == 2 / 32
    assert (found.verdict, found.reason, found.seeds_needed) == ("better", None, None)


def test_sign_flips_count_ties_that_rounding_hides():
    d = np.array([0.03, 0.01, -0.02, 0.02, 0.01])
    steps = [round(100 * x) for x in d]
    flipped = (
        sum(s * x for s, x in zip(signs, steps, strict=True))
        for signs in itertools.product((1, -1), repeat=5)
    )
    exact = sum(abs(total) >= abs(sum(steps)) for total in flipped)
    assert sign_flips(d) == exact / 32
    assert sign_flips([]) != sign_flips([])  # NaN
    many = np.random.default_rng(1).normal(0.5, 1, 20)
    t = stats.ttest_1samp(many, 0).pvalue
    assert sign_flips(many) == sign_flips(many) == pytest.approx(t, abs=0.02)


def test_holm():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_three_equal_differences_of_one_sample_are_not_certain():
    a, b = [0.51, 0.61, 0.71], [0.50, 0.60, 0.70]
    assert one(a, b).p < 1e-12
    floored = one(a, b, floor=floor_of(100, 1))
    assert floored.sd == pytest.approx(0.01 / math.sqrt(6))
    assert floored.p == pytest.approx(2 * stats.t.sf(0.01 / (0.01 / math.sqrt(18)), 2))
    assert (
        floor_of(355, 10) == pytest.approx(1 / (355 * math.sqrt(10)) / math.sqrt(6))
        and floor_of(None, 1) == 0
    )


def test_the_order_of_verdicts():
    assert one([1, 1], [0, 0]).verdict == "undecided" and "2 common seeds" in one([1, 1], [0, 0]).reason
    small = one([0.5004, 0.5005, 0.5006], [0.5, 0.5, 0.5], margin=0.005)
    assert small.p < 0.05 and small.verdict == "equivalent", "the margin comes first"
    assert one([0.5004, 0.5005, 0.5006], [0.5, 0.5, 0.5]).verdict == "better"
    wide = one([0.5, 0.6, 0.4, 0.55], [0.5, 0.5, 0.5, 0.5], margin=0.005)
    assert (wide.verdict == "undecided" and wide.seeds_needed == 101) or wide.seeds_needed > 4
    (same,) = judge([pair(("a", {0: 1.0, 1: 2.0, 2: 3.0}), ("b", {0: 1.0, 1: 2.0, 2: 3.0}))], [True])
    assert (same.verdict, same.reason, same.p) == ("equivalent", "identical bits", 1.0)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "n"),
    [
        ([math.nan] * 3, [0.5] * 3, "worse", 0),
        ([0.5] * 3, [math.inf] * 3, "better", 0),
        ([0.9, 0.9, 0.9, math.nan], [0.1, 0.2, 0.3, 0.1], "undecided", 3),
        ([math.nan] * 3, [math.nan] * 3, "undecided", 0),
        ([math.nan] * 2, [0.5] * 2, "undecided", 0),
    ],
)
def test_what_is_not_finite_is_never_dropped_silently(a, b, verdict, n):
    found = one(a, b, margin=0.005)
    assert (found.verdict, found.n, len(found.seeds)) == (verdict, n, len(a))
    assert f"of {len(a)} seeds" in found.reason and found.reason.startswith("not finite:")


def test_only_common_seeds_are_paired_and_less_may_be_better():
    found = judge(
        [pair(("a", {0: 1.0, 1: 1.0, 2: 1.0, 7: 9.0}), ("b", {2: 3.0, 1: 2.0, 0: 2.5, 5: 0.0}), sign=-1)]
    )[0]
    assert found.seeds == (0, 1, 2) and found.mean == pytest.approx(1.5) and found.differences[2] == 2.0


def test_one_seed_that_decides_is_named():
    found = judge(
        [pair(("a", {0: 0.9, 1: 0.91, 4: 0.1}), ("b", dict.fromkeys((0, 1, 4), 0.905)))], scale=100
    )[0]
    assert "one seed decides: seed 4, -80.5" in found.notes
    assert any(note.startswith("3 seeds") for note in found.notes)


@pytest.mark.parametrize(("delta", "n"), [(0.5, 34), (1, 10), (1.5, 6), (2, 5), (3, 4), (0.1, 101), (0, 101)])
def test_seeds_needed_are_those_of_the_power_table(delta, n):
    assert seeds_needed(delta * 7, 7) == n


NUMBERS = st.lists(st.tuples(*[st.integers(-50, 50)] * 2), min_size=3, max_size=8)


@given(NUMBERS, st.integers(0, 7))
def test_swapping_scaling_and_permuting(pairs, start):
    a, b = ([p[i] / 64 for p in pairs] for i in (0, 1))
    found = one(a, b, margin=0.125)
    other = one(b, a, margin=0.125)
    assert (other.verdict, other.p, other.p_flip) == (OPPOSITE[found.verdict], found.p, found.p_flip)
    assert (other.mean, other.low, other.high) == (-found.mean, -found.high, -found.low)
    scaled = one([4 * x for x in a], [4 * x for x in b], margin=0.5)
    assert (scaled.verdict, scaled.p, scaled.seeds_needed) == (found.verdict, found.p, found.seeds_needed)
    assert (scaled.mean, scaled.low, scaled.high) == (4 * found.mean, 4 * found.low, 4 * found.high)
    places = [(i + start) % len(pairs) for i in range(len(pairs))][::-1]
    moved = judge([pair(("a", {i: a[i] for i in places}), ("b", {i: b[i] for i in places}), margin=0.125)])[0]
    assert moved == found


def rates(delta, margin, n, sd=1.0, draws=4000):
    d = np.random.default_rng(0).normal(delta, sd, (draws, n))
    found = paired(d)
    words, counts = np.unique(decide(found, n - 1, found.p, margin), return_counts=True)
    return dict(zip(words.tolist(), (counts / draws).tolist(), strict=True))


def test_error_rates_over_simulated_campaigns():
    equal = rates(0.0, None, 5)
    assert 0.04 <= equal["better"] + equal["worse"] <= 0.06
    at_margin = rates(1.0, 1.0, 5)
    assert 0.04 <= at_margin["equivalent"] <= 0.06
    assert 0.35 <= at_margin["better"] <= 0.43 and at_margin.get("worse", 0) == 0
    assert rates(1.5, None, 5)["better"] == pytest.approx(0.72, abs=0.03)
    assert rates(0.0, 1.0, 10)["equivalent"] == pytest.approx(0.80, abs=0.03)


def test_holm_holds_the_error_of_a_family_at_its_level():
    rng = np.random.default_rng(2)
    d = rng.normal(0, 1, (2000, 5, 5)) - rng.normal(0, 1, (2000, 1, 5))  # five methods against one reference
    p = paired(d).p
    raw = (p < 0.05).any(axis=1).mean()
    adjusted = np.mean([min(holm(row)) < 0.05 for row in p.tolist()])
    assert raw > 0.12 and 0.02 < adjusted < 0.06


def test_the_bootstrap_interval_is_narrower():
    values = np.array([0.1, 0.3, -0.1, 0.2, 0.4])
    found = pair(("a", dict(enumerate(values))), ("b", dict.fromkeys(range(5), 0.0)), interval=bca)
    t = pair(("a", dict(enumerate(values))), ("b", dict.fromkeys(range(5), 0.0)))
    assert t.low < found.low < found.high < t.high and found.p == t.p


def test_over_other_test_samples_too():
    rng = np.random.default_rng(3)
    right = rng.random((2, 5, 400)) < 0.8  # of two equal methods, by seed and sample
    means = right.mean(axis=2)
    values = [("a", dict(enumerate(means[0]))), ("b", dict(enumerate(means[1])))]
    samples = (right[0].astype(float) - right[1]).mean(axis=0)
    narrow, wide = pair(*values), pair(*values, samples=samples)
    seeds, drawn = narrow.sd**2 / 5, samples.var(ddof=1) / 400
    assert wide.error == pytest.approx(math.sqrt(seeds + drawn))
    assert wide.df == pytest.approx((seeds + drawn) ** 2 / (seeds**2 / 4 + drawn**2 / 399))
    assert wide.p == pytest.approx(2 * stats.t.sf(abs(wide.mean) / wide.error, wide.df))
    assert (wide.high - wide.low) == pytest.approx(2 * stats.t.ppf(0.975, wide.df) * wide.error)
