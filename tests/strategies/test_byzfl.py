"""Rules, pre-aggregators and optimised attacks against ByzFL, where it is installed (``pip install --no-deps byzfl``:
its torchvision is not needed for these)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rules import draw

from benchmarks import byzfl_rules
from clients.attacks import OptimalALIE, OptimalIPM, line_search
from fedsim.errors import ConfigError
from strategies.aggregators import (
    arc,
    bucketing,
    caf,
    centered_clipping,
    check_enough,
    clipping,
    coordinate_median,
    geometric_median,
    krum,
    mda,
    meamed,
    monna,
    multi_krum,
    nnm,
    smea,
    trimmed_mean,
)

N, D = 11, 40


@pytest.fixture(scope="module")
def byzfl() -> SimpleNamespace:
    """ByzFL's rules and attacks, without the rest of the package, which needs torchvision."""
    found = byzfl_rules.load()
    if not found:
        pytest.skip("byzfl is not installed")
    return SimpleNamespace(**found)


@pytest.mark.parametrize("f", [1, 3])
@pytest.mark.parametrize("shape", [(N, D), (12, 5)])
def test_rules_equal_byzfl(byzfl: SimpleNamespace, f: int, shape: tuple[int, int]) -> None:
    u = draw(*shape, seed=f)
    pairs = {
        "MDA": (mda(u, f=f), byzfl.MDA(f)),
        "MoNNA": (monna(u, f=f, idx=2), byzfl.MoNNA(f, 2)),
        "NNM": (nnm(u, f=f), byzfl.NNM(f)),
        "ARC": (arc(u, f=f), byzfl.ARC(f)),
        "Clipping": (clipping(u, c=2.0), byzfl.Clipping(2.0)),
        "Krum": (krum(u, f=f, variant="byzfl"), byzfl.Krum(f)),
        "MultiKrum": (multi_krum(u, f=f, variant="byzfl"), byzfl.MultiKrum(f)),
        "TrMean": (trimmed_mean(u, f=f), byzfl.TrMean(f)),
        "Median": (coordinate_median(u), byzfl.Median()),
        "Meamed": (meamed(u, f=f), byzfl.Meamed(f)),
    }
    for name, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(ours, theirs(u.copy()), rtol=0, atol=1e-9, err_msg=name)
    memory, centre = byzfl.CenteredClipping(L=3, tau=4.0), None
    for _ in range(2):  # each goes on from its last result
        centre = centered_clipping(u, tau=4.0, L=3, centre=centre)
        np.testing.assert_allclose(centre, memory(u.copy()), rtol=0, atol=1e-9)


def test_the_geometric_median_is_where_byzfl_converges_to(byzfl: SimpleNamespace) -> None:
    """It takes three steps from zero by default, which far from zero are not enough."""
    u = draw(N, D, 3)
    theirs = byzfl.GeometricMedian(nu=1e-6, T=300)(u.copy())
    np.testing.assert_allclose(geometric_median(u), theirs, rtol=0, atol=1e-9)
    for rows in (u, u + 100, 1e-3 * u, u[:1]):
        found = geometric_median(rows, start="zero", iterations=3, nu=0.1, tolerance=0)
        np.testing.assert_allclose(found, byzfl.GeometricMedian()(rows.copy()), rtol=0, atol=1e-9)


def test_krum_asks_for_no_more_updates_than_byzfl(byzfl: SimpleNamespace) -> None:
    for n in range(2, 8):
        u, f = draw(n, 5, n), (n - 1) // 2
        np.testing.assert_allclose(krum(u, f=f, variant="byzfl"), byzfl.Krum(f)(u.copy()), atol=1e-12)
        np.testing.assert_allclose(
            multi_krum(u, f=f, variant="byzfl"), byzfl.MultiKrum(f)(u.copy()), atol=1e-12
        )
        with pytest.raises(ValueError, match=rf"f={f + 1} needs n >= 2f \+ 1 = {2 * f + 3} updates, got {n}"):
            krum(u, f=f + 1, variant="byzfl")
    rule = partial(krum, f=3, variant="byzfl")
    check_enough(rule, 7, "clients_per_round=7", str)
    with pytest.raises(ConfigError, match=r"krum variant=byzfl needs 2f \+ 1 = 7 updates, .* aggregator.f=2"):
        check_enough(rule, 6, "clients_per_round=6", str)


def test_buckets_of_one_permutation_equal_byzfls(byzfl: SimpleNamespace) -> None:
    u = draw(N, D, 6)
    np.random.seed(5)
    order = np.random.permutation(N)
    np.random.seed(5)
    np.testing.assert_allclose(bucketing(u, s=3, permutation=order), byzfl.Bucketing(3)(u.copy()), atol=1e-12)


@pytest.mark.parametrize("f", [0, 1, 3, 5])
def test_both_clippings_equal_byzfls_in_single_precision(byzfl: SimpleNamespace, f: int) -> None:
    """Rows of zeros, and rows of equal norms at the threshold, among them; before a rule as by themselves."""
    u = torch.tensor(draw(N, D, f), dtype=torch.float32)
    u[0], u[2] = 0, -u[1]
    found = {"ARC": (arc(u, f=f), byzfl.ARC(f)), "Clipping": (clipping(u, c=3.0), byzfl.Clipping(3.0))}
    for name, (ours, theirs) in found.items():
        torch.testing.assert_close(ours, theirs(u.clone()), rtol=1e-6, atol=1e-6, msg=name)
    both = byzfl.ARC(f)(u.clone())
    before = coordinate_median(u, before=[{"arc": {"f": f}}, {"clipping": {"c": 3.0}}])
    wanted = np.median(byzfl.Clipping(3.0)(both).numpy(), axis=0)
    np.testing.assert_allclose(before.numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_arc_clips_as_many_as_published_where_a_rounded_product_is_one_less() -> None:
    """Of n = 242 rows and f = 33, k = 2 f (n - f) / n is 57; in floating point 56.99..., which ByzFL cuts to 56."""
    n, f = 242, 33
    out = arc(np.arange(1.0, n + 1)[:, None], f=f)[:, 0]
    assert 2 * f * (n - f) == 57 * n and np.isclose(out, n - 57).sum() == 58
    assert int((2 * f / n) * (n - f)) == 56


def test_arc_clips_as_many_as_byzfl_for_any_count(byzfl: SimpleNamespace) -> None:
    for n in range(2, 40):
        u = np.arange(1.0, n + 1)[:, None]
        for f in range(n // 2 + 1):
            np.testing.assert_allclose(arc(u, f=f), byzfl.ARC(f)(u.copy()), err_msg=f"{n}, {f}")


def test_spectral_rules_equal_byzfl_where_its_power_step_is_exact(byzfl: SimpleNamespace) -> None:
    """It makes one step from a random vector, which finds the eigenvalue of numbers."""
    line = draw(N, 1, 5)
    np.testing.assert_allclose(caf(line, f=3), byzfl.CAF(3)(line.copy()), rtol=0, atol=1e-9)
    np.testing.assert_allclose(smea(line, f=3), byzfl.SMEA(3)(line.copy()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("delta", [10.0, -3.0])
@pytest.mark.parametrize("kind", ["ALittleIsEnough", "InnerProductManipulation"])
def test_optimised_attacks_equal_byzfl(byzfl: SimpleNamespace, kind: str, delta: float) -> None:
    honest, f = draw(8, 20, 4), 3
    ours: Any = (OptimalALIE if kind == "ALittleIsEnough" else OptimalIPM)(
        fraction=0.2, evals=20, start=0.0, delta=delta, ratio=0.8
    )
    theirs = getattr(byzfl, f"Optimal_{kind}")(
        agg=byzfl.TrMean(f), pre_agg_list=[byzfl.NNM(f)], f=f, delta=delta
    )
    rows = torch.tensor(honest)
    rule = partial(trimmed_mean, f=f, before=["nnm"])
    found = ours.collude_against(rows[:f], rows, rule)
    assert found.shape == (f, 20) and torch.equal(found[0], found[1])
    np.testing.assert_allclose(found[0], theirs(honest.copy()), rtol=0, atol=1e-9)


def test_the_line_search_doubles_and_then_narrows() -> None:
    tried: list[float] = []

    def measure(x: float) -> float:
        tried.append(x)
        return -abs(x - 35.0)

    best = line_search(measure, evals=7)
    assert tried[:5] == [0.0, 10.0, 30.0, 70.0, 62.0] and best == 30.0
    assert 30.0 < line_search(measure, evals=40) < 40.0
