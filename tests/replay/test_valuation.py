"""Values of players: reference values, and the axioms that they fulfil."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GOLDEN

from fedsim.replay import valuation as values
from fedsim.replay.kernelshap import shapley_by_kernel, weighted_coalitions

utilities = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=64))


def test_reference_values() -> None:
    with np.load(GOLDEN / "replay.npz") as z:
        np.testing.assert_allclose(values.shapley(z["v"], 5), z["shapley"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(values.banzhaf(z["v"], 5), z["banzhaf"], rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """v({0}) = 1, v({1}) = 2, v({0, 1}) = 5: each joins first in one of two orders."""
    v = [0, 1, 2, 5]
    assert values.shapley(v, 2).tolist() == [(1 + 3) / 2, (2 + 4) / 2] == values.banzhaf(v, 2).tolist()
    assert values.leave_one_out(v, 2).tolist() == [3, 4]


@settings(max_examples=25, deadline=None)
@given(utilities)
def test_shapley_values_sum_to_what_all_achieve(v: np.ndarray) -> None:
    assert values.shapley(v, 6).sum() == pytest.approx(v[63] - v[0], abs=1e-9)
    orders = values.antithetic_orders(6, 3, np.random.default_rng(0))
    assert values.shapley_by_orders(v, orders).sum() == pytest.approx(v[63] - v[0], abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(utilities, st.integers(0, 5))
def test_who_makes_no_difference_is_worth_exactly_nothing(v: np.ndarray, k: int) -> None:
    masks = np.arange(64) & ~(1 << k)
    u, orders = v[masks], values.antithetic_orders(6, 4, np.random.default_rng(1))
    for found in (
        values.shapley(u, 6),
        values.banzhaf(u, 6),
        values.leave_one_out(u, 6),
        values.shapley_by_orders(u, orders),
        values.banzhaf_by_orders(u, orders),
    ):
        assert found[k] == 0


@settings(max_examples=25, deadline=None)
@given(utilities, st.permutations(range(6)))
def test_players_that_do_the_same_are_worth_the_same(v: np.ndarray, chosen: list[int]) -> None:
    a, b = chosen[:2]

    def u(coalition: frozenset[int]) -> float:
        """Tells a from b by nothing but their number."""
        rest = sum(1 << c for c in coalition - {a, b})
        return float(v[rest]) + len(coalition & {a, b}) ** 2 * float(v[rest ^ 1])

    for of in (values.shapley, values.banzhaf):
        found = of(u, 6)
        assert found[a] == pytest.approx(found[b], abs=1e-12)


def test_orders_come_with_their_reverse_and_within_the_budget() -> None:
    orders = values.orders_within(10, 60, np.random.default_rng(3))
    assert all(order[::-1] == back for order, back in zip(orders[::2], orders[1::2], strict=True))
    assert len(values.met_by(orders)) <= 60
    longer = values.orders_within(10, 100, np.random.default_rng(3))
    assert longer[: len(orders)] == orders  # what a smaller budget has computed counts
    assert values.orders_within(10, 18, np.random.default_rng(3)) == orders[:1]  # a pair meets 19


def test_least_squares_over_all_coalitions_are_the_shapley_values() -> None:
    for n in (2, 3, 6):
        v, rng = np.random.default_rng(n).normal(size=2**n), np.random.default_rng(0)
        weights = weighted_coalitions(n, 2**n, rng)
        assert len(weights) == 2**n - 1
        np.testing.assert_allclose(shapley_by_kernel(v, n, weights), values.shapley(v, n), rtol=0, atol=1e-9)


def test_least_squares_over_some_coalitions_keep_the_budget_and_the_sum() -> None:
    v = np.random.default_rng(1).normal(size=2**10) / 4 + [bin(i).count("1") for i in range(2**10)]
    errors = []
    for budget in (20, 100, 400):
        weights = weighted_coalitions(10, budget, np.random.default_rng(2))
        assert budget - 2 <= len(weights) <= budget
        assert {frozenset(range(10)) - c for c in weights if len(c) < 10} <= set(
            weights
        )  # each with its complement
        found = shapley_by_kernel(v, 10, weights)
        assert found.sum() == pytest.approx(v[-1] - v[0], abs=1e-9)
        errors.append(np.abs(found - values.shapley(v, 10)).max())
    assert errors[2] < 0.1 < errors[0]


def test_a_budget_of_all_coalitions_ends() -> None:
    assert len(values.met_by(values.orders_within(4, 1000, np.random.default_rng(0)))) == 15


def test_orders_estimate_what_all_coalitions_give() -> None:
    v = np.random.default_rng(5).normal(size=64)
    orders = values.antithetic_orders(6, 4000, np.random.default_rng(6))
    np.testing.assert_allclose(values.shapley_by_orders(v, orders), values.shapley(v, 6), atol=0.05)
    np.testing.assert_allclose(values.banzhaf_by_orders(v, orders), values.banzhaf(v, 6), atol=0.05)
