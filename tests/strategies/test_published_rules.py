"""Rules and pre-aggregators against their published equations in float64, as loops; one after the other; padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rules import draw

from strategies import aggregators
from strategies.aggregators import (
    arc,
    bucketing,
    caf,
    centered_clipping,
    clipping,
    krum,
    mda,
    mean,
    monna,
    nnm,
    smea,
)

N, D = 11, 40


# -- the equations, one by one ------------------------------------------------------------------------------------


def distances(u: np.ndarray) -> np.ndarray:
    return np.linalg.norm(u[:, None] - u[None], axis=2)


def by_subsets(u: np.ndarray, f: int, cost: Callable[[np.ndarray], float]) -> np.ndarray:
    subsets = itertools.combinations(range(len(u)), len(u) - f)
    return u[list(min(subsets, key=lambda s: cost(u[list(s)])))].mean(0)


def diameter(x: np.ndarray) -> float:
    return float(distances(x).max())


def spread(x: np.ndarray) -> float:
    return float(np.linalg.norm(x - x.mean(0), 2))


def loop_monna(u: np.ndarray, f: int, idx: int) -> np.ndarray:
    return u[np.argsort(np.linalg.norm(u - u[idx], axis=1), kind="stable")[: len(u) - f]].mean(0)


def loop_centered(u: np.ndarray, tau: float, steps: int, v: np.ndarray) -> np.ndarray:
    for _ in range(steps):
        v = v + np.mean([(x - v) * min(1, tau / np.linalg.norm(x - v)) for x in u], axis=0)
    return v


def loop_caf(u: np.ndarray, f: int) -> np.ndarray:
    c, best, least = np.ones(len(u)), u.mean(0), np.inf
    while c.sum() > len(u) - 2 * f:
        mu = c @ u / c.sum()
        x = u - mu
        values, vectors = np.linalg.eigh((c[:, None] * x).T @ x / c.sum())
        if values[-1] < least:
            best, least = mu, values[-1]
        tau = (x @ vectors[:, -1]) ** 2
        c = c * (1 - tau / tau.max())
    return best


def loop_nnm(u: np.ndarray, f: int) -> np.ndarray:
    return np.array([u[np.argsort(row, kind="stable")[: len(u) - f]].mean(0) for row in distances(u)])


def loop_arc(u: np.ndarray, f: int) -> np.ndarray:
    size = np.linalg.norm(u, axis=1)
    bound = np.sort(size)[::-1][2 * f * (len(u) - f) // len(u)]
    return u * np.minimum(1, bound / size)[:, None]


EQUATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mda": (partial(mda, f=3), lambda u: by_subsets(u, 3, diameter)),
    "smea": (partial(smea, f=3), lambda u: by_subsets(u, 3, spread)),
    "caf": (partial(caf, f=3), lambda u: loop_caf(u, 3)),
    "monna": (partial(monna, f=3, idx=4), lambda u: loop_monna(u, 3, 4)),
    "centered": (partial(centered_clipping, tau=2.0, L=4), lambda u: loop_centered(u, 2.0, 4, 0 * u[0])),
    "centered-once": (partial(centered_clipping, tau=9.0), lambda u: loop_centered(u, 9.0, 1, 0 * u[0])),
    "nnm": (partial(nnm, f=3), lambda u: loop_nnm(u, 3)),
    "arc": (partial(arc, f=3), lambda u: loop_arc(u, 3)),
    "clipping": (
        partial(clipping, c=2.0),
        lambda u: u * np.minimum(1, 2 / np.linalg.norm(u, axis=1))[:, None],
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_is_its_published_equation(name: str) -> None:
    ours, equation = EQUATIONS[name]
    for n, d, seed in ((N, D, 0), (9, 3, 1), (10, 1, 2)):
        u = draw(n, d, seed)
        np.testing.assert_allclose(ours(u), equation(u), rtol=0, atol=1e-9)
        single = ours(torch.tensor(u, dtype=torch.float32))
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single, equation(u.astype(np.float32)), rtol=0, atol=1e-5)


def test_centered_clipping_goes_on_from_its_centre() -> None:
    u, v = draw(), draw(seed=7)[3]
    for steps in (1, 3):
        found = centered_clipping(u, tau=3.0, L=steps, centre=v)
        np.testing.assert_allclose(found, loop_centered(u, 3.0, steps, v), rtol=0, atol=1e-9)
    mixed = centered_clipping(u, tau=3.0, L=2, centre=v, before=[{"nnm": {"f": 2}}])
    np.testing.assert_allclose(mixed, loop_centered(loop_nnm(u, 2), 3.0, 2, v), rtol=0, atol=1e-9)


def test_subsets_are_found_among_many_updates_and_refused_where_they_are_too_many() -> None:
    u = draw(40, 12)
    hidden = np.random.default_rng(0).choice(40, 12, replace=False)
    u[hidden] = 100 * np.random.default_rng(1).normal(size=(12, 12))
    report: dict[str, Any] = {}
    mda(u, f=12, report=report)
    assert set(report["selected"]) == set(range(40)) - set(hidden.tolist())
    with pytest.raises(ValueError, match=r"smea: f=12 of 40 updates are 5586853480 subsets"):
        smea(u, f=12)


def test_of_equal_diameters_the_first_subset_counts() -> None:
    line = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    report: dict[str, Any] = {}
    assert mda(line, f=2, report=report) == [1] and report["selected"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["mda", "smea", "caf", "monna", "nnm", "krum", "geometric_median"])
def test_what_all_updates_have_in_common_hides_no_difference(name: str) -> None:
    """Squared distances are taken from inner products, of which a common part ten million times as long leaves none."""
    rule = partial(getattr(aggregators, name), **({} if name == "geometric_median" else {"f": 3}))
    u = np.round(draw(), 6)
    np.testing.assert_allclose(rule(u + 1e7) - 1e7, rule(u), rtol=0, atol=2e-7)


def test_lengths_far_apart_change_no_choice() -> None:
    u = draw()
    u[-2:] = 1e30
    np.testing.assert_allclose(smea(u, f=4), by_subsets(u[:-2], 2, spread), atol=1e-9)
    for size in (1e-100, 1e100):
        np.testing.assert_allclose(caf(size * draw(), f=3) / size, caf(draw(), f=3), atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_norms_of_long_equal_updates_in_single_precision(value: float) -> None:
    """Where sums in float32 are rounded to the same side all along."""
    u = np.full((3, 300_000), value, np.float32) * np.arange(1, 4, dtype=np.float32)[:, None]
    wide = u.astype(np.float64)
    np.testing.assert_allclose(clipping(u, c=2.0), EQUATIONS["clipping"][1](wide), rtol=4e-7)
    np.testing.assert_allclose(arc(u, f=1), loop_arc(wide, 1), rtol=4e-7)


def test_caf_ends_where_the_published_loop_would_not() -> None:
    u = draw(seed=3)
    u[0] = 1e12 * np.ones(D)
    assert np.linalg.norm(caf(u, f=2)) < 30
    np.testing.assert_allclose(caf(np.tile(u[1], (9, 1)), f=4), u[1], atol=1e-12)


def test_f_of_zero_leaves_the_mean() -> None:
    u = draw()
    for rule in (mda, smea, caf, monna):
        np.testing.assert_allclose(rule(u, f=0), u.mean(0), atol=1e-12)
    np.testing.assert_allclose(nnm(u, f=0), np.tile(u.mean(0), (N, 1)), atol=1e-12)
    np.testing.assert_array_equal(arc(u, f=0), u)


def test_buckets_are_means_of_the_permuted_updates() -> None:
    u = draw()
    order = np.random.default_rng(0).permutation(N)
    found = bucketing(u, s=3, permutation=order)
    expected = [u[order[i : i + 3]].mean(0) for i in range(0, N, 3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    drawn = bucketing(u, s=3)
    np.testing.assert_allclose(bucketing(u[order], s=3), drawn, atol=1e-12)
    np.testing.assert_allclose(drawn[:3].sum(0) * 3 + drawn[3] * 2, u.sum(0), atol=1e-9)
    assert not np.allclose(bucketing(u, s=3, seed=1), drawn) and not np.allclose(
        bucketing(2 * u, s=3), 2 * drawn
    )
    report: dict[str, Any] = {}
    krum(u, f=0, before=[{"bucketing": {"s": 3, "permutation": order.tolist()}}], report=report)
    assert report["selected"] in [sorted(order[i : i + 3].tolist()) for i in range(0, N, 3)]


# -- one after the other ------------------------------------------------------------------------------------------

ORDER = np.random.default_rng(2).permutation(15).tolist()
CHAINS = (
    ["nnm"],
    ["clipping", "nnm"],
    ["arc", {"bucketing": {"s": 2, "permutation": ORDER}}, "nnm"],
    [partial(bucketing, s=2), {"clipping": {"c": 1.5}}],
)
WITHOUT_TIES = [
    r for r in aggregators.RULES if r != "bulyan"
]  # its last picks are ties, more so of mixed rows


@pytest.mark.parametrize(
    "chain", CHAINS, ids=["nnm", "clipping-nnm", "arc-bucketing-nnm", "bucketing-clipping"]
)
@pytest.mark.parametrize("name", WITHOUT_TIES)
def test_a_chain_before_a_rule_is_one_after_the_other(name: str, chain: list[Any]) -> None:
    rule, own = getattr(aggregators, name), {"f": 1} if name in aggregators.rows.NEEDED else {}
    rows = u = draw(15)
    for stage, options in aggregators.before.stages(chain, 2):
        rows = getattr(aggregators, stage)(rows, **options)
    given = [s if s not in ("nnm", "arc") else {s: {"f": 2}} for s in chain]
    report: dict[str, Any] = {}
    found = rule(u, before=given, report=report, **own)
    np.testing.assert_allclose(found, rule(rows, **own), rtol=0, atol=1e-8)
    if "coefficients" in report:
        np.testing.assert_allclose(np.array(report["coefficients"]) @ u, found, rtol=0, atol=1e-8)
    broken = np.insert(u, 4, np.nan, axis=0)
    with pytest.warns(UserWarning, match=r"rows \[4\] are not finite"):
        np.testing.assert_allclose(rule(broken, before=given, **own), found, rtol=0, atol=1e-8)


def test_the_rules_own_f_serves_what_comes_before_it() -> None:
    u = draw()
    np.testing.assert_allclose(krum(u, f=2, before=["nnm"]), krum(nnm(u, f=2), f=2), atol=1e-9)


@pytest.mark.parametrize("name", [*aggregators.RULES, "nnm", "arc", "clipping", "bucketing"])
def test_padding_changes_nothing(name: str) -> None:
    """Flat vectors hold zeros between tensors."""
    rule = getattr(aggregators, name)
    own = {"f": 2} if name in aggregators.rows.NEEDED else {"s": 2} if name == "bucketing" else {}
    for options in (own, own | {"before": [{"bucketing": {"s": 2}}]}):
        if name not in aggregators.RULES and "before" in options:
            continue
        if name == "bulyan" and "before" in options:
            options["f"] = 1
        if name in ("krum", "multi_krum") and "before" in options:
            options["f"] = 1
        u = draw(15)
        padded = np.zeros((15, D + 9))
        at = np.r_[0:13, 16:30, 36 : 36 + 13]
        padded[:, at] = u
        found = rule(padded, **options)
        np.testing.assert_allclose(found[..., at], rule(u, **options), rtol=0, atol=1e-9)
        assert not np.delete(found, at, axis=-1).any()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("nnm", r"aggregator.before='nnm': must be a list, e.g. \[nnm\]"),
        (["nmn"], r"aggregator.before: 'nmn': choose among nnm, bucketing, arc, clipping"),
        ([mean], r"aggregator.before: 'mean': choose among"),
        (["nnm"], r"nnm needs an f, which the rule has not; write \{nnm: \{f: 2\}\}"),
        (["bucketing"], r"bucketing needs rows a bucket; write \{bucketing: \{s: 2\}\}"),
        ([{"bucketing": {"s": 0}}], r"bucketing: s=0 must be a whole number, at least 1"),
        ([{"bucketing": 2}], r"bucketing=2: options are written \{bucketing: \{key: value\}\}"),
        ([{"clipping": {"tau": 2}}], r"clipping has no 'tau'; it has c"),
        ([{"clipping": {"c": -1.0}}], r"clipping: c=-1.0 must be a number, at least 0"),
        ([{"arc": {"f": 0.5}}], r"arc: f=0.5 must be a whole number"),
        ([{"nnm": {"f": 11}}], r"nnm: f=11 needs n >= 1f \+ 1 = 12 updates, got 11"),
        ([{"bucketing": {"s": 2, "permutation": [0, 0]}}], r"must hold each of 0 to 10 once"),
    ],
)
def test_what_cannot_come_before_is_refused(before: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean(draw(), before=before)


def test_lengths_of_single_precision_are_exact_where_their_squares_are_not() -> None:
    """Squares of 1e25 are infinite in float32, those of 1e-25 are zero; a NaN is left out as ever."""
    u = torch.tensor(draw(7, D, 0), dtype=torch.float32)
    for i, size in enumerate((1.0, 1e25, 1e-25, 0.0)):
        u[i] *= size
    for rows in (u, u[3:], u[:1]):
        for before in ([{"arc": {"f": 0}}], [{"arc": {"f": 2}}], [{"clipping": {"c": 0.5}}]):
            if len(rows) > 2 or "clipping" in before[0]:
                wanted = mean(rows.double(), before=before)
                np.testing.assert_allclose(mean(rows, before=before), wanted, rtol=1e-6, atol=1e-30)
    u[4, 1] = torch.nan
    report: dict[str, Any] = {}
    out = mean(u, before=[{"clipping": {"c": 0.5}}], report=report)
    assert report["dropped"] == [4] and bool(torch.isfinite(out).all())
