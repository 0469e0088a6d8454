"""The lower bound on epsilon: reference values, and what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GOLDEN

from fedsim.replay.bound import epsilon_lower_bound, p_value, right_guesses


def test_reference_values() -> None:
    with np.load(GOLDEN / "replay.npz") as z:
        cases, plain, relaxed = z["audit_r_v"], z["audit_eps"], z["audit_eps_delta"]
    found = [epsilon_lower_bound(2000, r, v) for r, v in cases.tolist()]
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-8)
    found = [epsilon_lower_bound(2000, r, v, delta=1e-5) for r, v in cases.tolist()]
    np.testing.assert_allclose(found, relaxed, rtol=0, atol=1e-8)


def test_all_right_has_a_closed_form() -> None:
    """``q^r = level``."""
    q = 0.05 ** (1 / 100)
    assert epsilon_lower_bound(100, 100, 100) == pytest.approx(np.log(q / (1 - q)), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.data())
def test_more_right_guesses_show_more_and_more_guesses_show_less(r: int, data: st.DataObject) -> None:
    v = data.draw(st.integers(1, r))
    here = epsilon_lower_bound(500, r, v)
    assert here >= epsilon_lower_bound(500, r, v - 1)
    assert here >= epsilon_lower_bound(500, r + 1, v)
    assert here >= epsilon_lower_bound(500, r, v, delta=1e-4) >= 0


def test_random_scores_show_something_in_few_of_400_seeds() -> None:
    shown = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        v = right_guesses(rng.normal(size=200), rng.random(200) < 0.5, 100)
        shown += epsilon_lower_bound(200, 100, v) > 0
    assert shown <= 28


def test_guesses_by_hand() -> None:
    scores, present = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [True, False, True, True, True, False]
    assert right_guesses(scores, present, 4) == 2  # 5 is in; 4 is not; 1 is in, 0 is out
    assert right_guesses([np.nan, 1.0], [False, True], 2) == 2  # a diverged score is the lowest


@pytest.mark.parametrize(("m", "r", "v"), [(10, 20, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_numbers_are_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(ValueError, match="must not fall"):
        epsilon_lower_bound(m, r, v)
    with pytest.raises(ValueError, match="even number"):
        right_guesses([1.0, 2.0, 3.0], [True] * 3, 3)


def test_nothing_is_claimed_of_a_level_that_holds() -> None:
    assert p_value(0.0, 100, 100, 50) > 0.05
    assert epsilon_lower_bound(100, 100, 50) == 0
