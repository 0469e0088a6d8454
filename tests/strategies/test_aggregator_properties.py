"""Invariances of the robust rules, and the flag aggregator against its column form, on updates of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rules import RULES, each_rule

from strategies.aggregators import bulyan, flag, mean

Rule = Callable[..., Any]
BY_INNER_PRODUCTS = (
    "mean",
    "krum",
    "multi_krum",
    "geometric_median",
    "norm_clip",
    "flag",
    "flag_unit",
    "flag_pairs",
)
ROBUST = sorted(set(RULES) - {"mean", "flag_pairs"})
seeds = st.integers(0, 2**32 - 1)


def some(examples: int) -> Callable[..., Any]:
    """The same examples in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn, least: int = 11, most: int = 16) -> np.ndarray:
    """Updates (n, d) with more or less of a common part, of lengths that differ up to a hundredfold; d may be small."""
    n, d = draw(st.integers(least, most)), draw(st.integers(4, 60))
    common = draw(st.sampled_from((0.0, 0.5, 3.0)))
    rng = np.random.default_rng(draw(seeds))
    u = common * rng.normal(size=d) + rng.normal(size=(n, d))
    return u * 10 ** rng.uniform(-1, 1, size=(n, 1))


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    size = max(1e-3, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


# -- all rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@given(u=matrices(15, 18), seed=seeds)
@some(12)
def test_the_order_of_rows_does_not_matter(name: str, u: np.ndarray, seed: int) -> None:
    """With f <= 2 Bulyan's last picks are ties, which the first row wins."""
    rule = partial(bulyan, f=3) if name == "bulyan" else RULES[name]
    close(rule(np.random.default_rng(seed).permutation(u)), rule(u))


@each_rule
@given(u=matrices(), seed=seeds)
@some(12)
def test_names_and_signs_of_coordinates_do_not_matter(rule: Rule, u: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order, sign = rng.permutation(u.shape[1]), rng.choice([-1.0, 1.0], u.shape[1])
    if rule is RULES["bulyan_garfield"]:
        sign = np.ones_like(sign)  # of two middle values it takes the lower one
    close(rule(u[:, order] * sign), rule(u)[order] * sign)


@pytest.mark.parametrize("name", BY_INNER_PRODUCTS)
@given(u=matrices(), seed=seeds)
@some(12)
def test_rules_of_inner_products_turn_with_the_updates(name: str, u: np.ndarray, seed: int) -> None:
    d = u.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    close(RULES[name](u @ turn), RULES[name](u) @ turn)


@each_rule
@given(u=matrices(), factor=st.floats(0.1, 10))
@some(12)
def test_results_grow_with_the_updates(rule: Rule, u: np.ndarray, factor: float) -> None:
    grown = 1.0 if rule is RULES["flag_unit"] else factor
    close(rule(factor * u), grown * rule(u), 1e-8)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"norm_clip", "flag", "flag_unit", "flag_pairs"}))
@given(u=matrices(), seed=seeds)
@some(12)
def test_rules_of_differences_move_with_the_updates(name: str, u: np.ndarray, seed: int) -> None:
    shift = np.random.default_rng(seed).normal(size=u.shape[1])
    close(RULES[name](u + shift), RULES[name](u) + shift, 1e-8)


@each_rule
@given(
    u=matrices(),
    bad=st.lists(st.tuples(st.integers(0, 10), st.sampled_from((np.nan, np.inf, -np.inf))), max_size=3),
)
@some(12)
def test_rows_that_are_not_finite_might_as_well_not_be_there(
    rule: Rule, u: np.ndarray, bad: list[tuple[int, float]]
) -> None:
    whole, at = u, []
    for place, value in bad:
        row = np.zeros(u.shape[1])
        row[-1] = value
        whole = np.insert(whole, place, row, axis=0)
        at = [i + (i >= place) for i in at] + [place]
    report: dict[str, Any] = {}
    close(rule(whole, report=report), rule(u))
    assert report["dropped"] == sorted(at)


@each_rule
@given(u=matrices())
@some(8)
def test_equal_updates_aggregate_to_themselves(rule: Rule, u: np.ndarray) -> None:
    equal = np.tile(u[0], (11, 1))
    close(rule(equal), 11 / 6 * u[0] / np.linalg.norm(u[0]) if rule is RULES["flag_unit"] else u[0])


@pytest.mark.parametrize("name", ROBUST)
@given(seed=seeds, size=st.sampled_from((1e6, 1e12, 1e30)), d=st.integers(4, 60))
@some(8)
def test_one_enormous_update_cannot_carry_the_result_away(name: str, seed: int, size: float, d: int) -> None:
    rng = np.random.default_rng(seed)
    u = 3 * rng.normal(size=d) + rng.normal(size=(11, d))
    honest = np.linalg.norm(u[1:], axis=1).max()
    u[0] = size
    assert np.linalg.norm(RULES[name](u)) <= 2 * honest < np.linalg.norm(mean(u))


# -- the flag aggregator ------------------------------------------------------------------------------------------

pair_weights = st.sampled_from((0.0, 2.0, 20.0))


@given(u=matrices(5), seed=seeds, lam=pair_weights)
@some(40)
def test_the_unit_scale_sees_directions_only(u: np.ndarray, seed: int, lam: float) -> None:
    out = flag(u, scale="unit", lam=lam)
    longer = u * 10 ** np.random.default_rng(seed).uniform(-3, 3, size=(len(u), 1))
    close(flag(longer, scale="unit", lam=lam), out, 1e-8)
    far = u.copy()
    far[0] *= 1e6
    close(flag(far, scale="unit", lam=lam), out, 1e-8)


@given(u=matrices(3), scale=st.sampled_from(("unit", "raw", "median_norm")), lam=pair_weights)
@some(40)
def test_results_are_the_updates_times_their_coefficients(u: np.ndarray, scale: str, lam: float) -> None:
    report: dict[str, Any] = {}
    out = flag(u, scale=scale, lam=lam, report=report)
    close(np.array(report["coefficients"]) @ u, out, 1e-11)
    inside = np.linalg.lstsq(u.T, out, rcond=None)[0] @ u
    close(inside, out)
    assert all(-1e-12 <= v <= 1 + 1e-12 for v in report["explained"])
    assert report["objective"] == sorted(report["objective"], reverse=True)
    n, m = len(u), (len(u) + 2) // 2
    if scale == "unit":
        assert np.linalg.norm(out) <= n / m + 1e-9
    if scale == "median_norm":
        assert np.linalg.norm(out) <= np.median(np.linalg.norm(u, axis=1)) * (1 + 1e-9)


@given(u=matrices(2), more=st.integers(0, 5))
@some(40)
def test_raw_updates_in_a_full_subspace_are_averaged(u: np.ndarray, more: int) -> None:
    close(flag(u, m=min(u.shape) + more, scale="raw"), u.mean(0))


@given(u=matrices(5), seed=seeds, count=st.integers(1, 4))
@some(40)
def test_zero_updates_add_nothing(u: np.ndarray, seed: int, count: int) -> None:
    places = np.random.default_rng(seed).integers(0, len(u) + 1, count)
    with_zeros = np.insert(u, places, 0.0, axis=0)
    for m in (2, 5):
        close(flag(with_zeros, m=m, scale="unit"), flag(u, m=m, scale="unit"))


@given(u=matrices(5), times=st.integers(2, 3))
@some(40)
def test_duplicates_count_as_often_as_they_come(u: np.ndarray, times: int) -> None:
    options = {"m": 3, "scale": "unit", "tolerance": 0.0}
    close(flag(np.repeat(u, times, axis=0), **options), times * flag(u, **options), 1e-8)


def by_svd(u: np.ndarray, m: int, lam: float, pairs: str, scale: str, steps: int) -> tuple[np.ndarray, float]:
    """Algorithm 1 on the d x n matrix of columns, all pair columns written out; and its smallest spectral gap."""
    n, s = len(u), np.linalg.norm(u, axis=1)
    x = (u / s[:, None]).T
    columns, factors = list(x.T), [1.0] * n
    if lam:
        for i in range(n):
            for j in range(n):
                if i != j and pairs == "code":
                    columns.append(x[:, i] - x[:, j])
                    factors.append(lam / (n * (n - 1)))
                elif i != j:
                    columns.append((u[i] - u[j]) / np.linalg.norm(u[i] - u[j]))
                    factors.append(np.sqrt(lam / (n - 1)))
    a = np.array(columns).T
    y, objective, gap = np.zeros((len(x), m)), float(n), 1.0
    for _ in range(steps):
        residual = np.abs(1 - ((y.T @ a) ** 2).sum(0)) + 1e-7
        left, sigma, _ = np.linalg.svd(a * (np.array(factors) * residual**-0.25), full_matrices=False)
        gap = min(gap, (sigma[m - 1] - (sigma[m] if m < len(sigma) else 0.0)) / sigma[0])
        new = left[:, :m]
        value = np.sqrt(np.maximum(0, 1 - ((new.T @ x) ** 2).sum(0))).sum()
        if value >= objective:
            break
        drop, objective, y = objective - value, value, new
        if drop <= 1e-10 or objective <= 1e-10:
            break
    total = {"raw": u.sum(0) / n, "unit": x.sum(1) / m, "median_norm": np.median(s) * x.sum(1) / n}[scale]
    return y @ (y.T @ total), gap


@pytest.mark.parametrize("pairs", ["code", "paper"])
@pytest.mark.parametrize("scale", ["unit", "raw", "median_norm"])
@given(u=matrices(3, 12), lam=pair_weights, share=st.floats(0, 1), steps=st.sampled_from((1, 2, 5)))
@some(25)
def test_the_gram_form_equals_the_svd_form(
    pairs: str, scale: str, u: np.ndarray, lam: float, share: float, steps: int
) -> None:
    """Where the subspace is well defined: a gap as small as rounding leaves it open."""
    m = 1 + int(share * (min(u.shape) - 1))
    expected, gap = by_svd(u, m, lam, pairs, scale, steps)
    assume(gap > 1e-4)
    out = flag(u, m=m, lam=lam, pairs=pairs, scale=scale, iterations=steps)
    assert np.abs(out - expected).max() <= 1e-9 * max(1, np.abs(expected).max())
