"""Keys of randomness, who takes part, and where a cohort is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim import rng
from fedsim.engine.chunks import LARGE_MODEL, cut
from fedsim.errors import ConfigError
from fedsim.sampling.cohort import check_cohorts, sample

PINNED = {
    (0, "cohort", 0): 5291219008367413122,
    (0, "fit/batches", 3, 2): 3955870127197405815,
    (7, "model"): 10556405017295169762,
    (9223372036854775807, "holdout", 0, 1): 17475302941706645697,
}
PINNED_NUMPY = [643, 597, 56, 278]
PINNED_TORCH = [5, 2, 0, 3, 4, 1]


def test_keys_are_pinned() -> None:
    """They name every draw of every run ever made: changing one changes all published results."""
    assert {args: rng.key(*args) for args in PINNED} == PINNED
    assert rng.numpy_rng(0, "cohort", 3).integers(0, 1000, 4).tolist() == PINNED_NUMPY
    assert torch.randperm(6, generator=rng.torch_rng(0, "fit/batches", 3, 2)).tolist() == PINNED_TORCH


@given(
    st.integers(0, 2**63 - 1), st.text(min_size=1, max_size=8), st.lists(st.integers(0, 10**9), max_size=3)
)
def test_keys_fit_64_bits_and_repeat(seed: int, purpose: str, numbers: list[int]) -> None:
    value = rng.key(seed, purpose, *numbers)
    assert 0 <= value < 2**64
    assert value == rng.key(np.int64(seed), purpose, *map(np.int64, numbers))


def test_streams_of_different_keys_are_unrelated() -> None:
    keys = [
        rng.key(seed, purpose, round, client)
        for seed in range(3)
        for purpose in ("fit/batches", "fit/noise", "cohort")
        for round in range(10)
        for client in range(10)
    ]
    assert len(set(keys)) == len(keys)
    draws = np.stack([rng.numpy_rng(0, p, 0).normal(size=4000) for p in ("a", "b", "a/b")])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.06
    assert rng.key(0, "a", 1, 23) != rng.key(0, "a", 12, 3)


# -- sampling -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(1, 60), st.data())
def test_fixed_cohorts_are_distinct_sorted_and_repeat(
    seed: int, round: int, m: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, m))
    ids = sample(seed, round, m, size)
    assert len(ids) == size
    assert ids == sorted(set(ids))
    assert 0 <= ids[0] <= ids[-1] < m
    assert all(type(i) is int for i in ids)
    assert ids == sample(seed, round, m, size)


def test_every_client_is_equally_likely() -> None:
    counts = np.bincount(np.concatenate([sample(0, t, 20, 5) for t in range(4000)]), minlength=20)
    assert abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_bernoulli_cohorts_are_never_empty_and_have_the_right_mean() -> None:
    m, p = 30, 0.05
    sizes = np.array([len(sample(1, t, m, 1.5, "bernoulli")) for t in range(4000)])  # type: ignore[arg-type]
    assert sizes.min() >= 1
    expected = m * p / (1 - (1 - p) ** m)  # given that somebody takes part
    assert abs(sizes.mean() - expected) < 5 * sizes.std() / np.sqrt(len(sizes))
    counts = np.bincount(np.concatenate([sample(1, t, m, 2, "bernoulli") for t in range(3000)]), minlength=m)
    assert counts.max() / counts.min() < 1.6


def test_a_cohort_out_of_a_million_is_cheap() -> None:
    import time

    start = time.perf_counter()
    for t in range(100):
        assert len(sample(0, t, 1_000_000, 10)) == 10
    assert time.perf_counter() - start < 1.0


def test_given_cohorts_are_sorted_and_checked() -> None:
    assert check_cohorts([[2, 0], [1]], 2, 3) == [[0, 2], [1]]
    assert check_cohorts([[], [1], [2]], 1, 3) == [[], [1], [2]]
    for cohorts, told in (
        ([[0]], "1 rounds given, but rounds=2"),
        ([[0], [3]], r"cohorts\[1\]: client 3 does not exist; ids go from 0 to 2"),
        ([[0], [-1]], r"cohorts\[1\]: client -1"),
        ([[1, 1], [0]], r"cohorts\[0\]: a client is listed twice"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_cohorts(cohorts, 2, 3)


# -- chunks -------------------------------------------------------------------------------------------------------

works = st.lists(st.floats(0, 1e6), min_size=0, max_size=80)


@given(works, st.integers(0, 100), st.sampled_from([10, LARGE_MODEL]))
def test_chunks_are_contiguous_not_empty_and_cover_the_cohort(work: list[float], wish: int, dim: int) -> None:
    chunks = cut(work, wish, dim)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(len(work)))
    assert all(c.stop > c.start for c in chunks)
    default = 4 if dim >= LARGE_MODEL else min(max(len(work) // 16, 10), 64)
    assert len(chunks) == min(len(work), wish or default)


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=80), st.integers(1, 20))
def test_no_chunk_exceeds_its_share_by_more_than_one_client(work: list[float], wish: int) -> None:
    chunks = cut(work, wish, 10)
    count = len(chunks)
    squares = count * (2 * count - 1) / (6 * (count - 1)) if count > 4 else 0  # sum of (i / last)^2
    share = sum(work) / (count - 0.9 * squares)
    assert max(sum(work[c]) for c in chunks) <= share + max(work) + 1e-6 * sum(work)


def test_equal_work_is_cut_evenly() -> None:
    assert [c.stop - c.start for c in cut([3.0] * 12, 4, 10)] == [3, 3, 3, 3]
    assert [c.stop - c.start for c in cut([1.0, 1.0, 1.0, 9.0], 2, 10)] == [3, 1]


def test_the_last_chunks_are_small() -> None:
    """Shares 1 - 0.9 (i / 5)^2 of 4.02 for 400 equal clients: borders at 99.5, 195.4, 280.6, 347.9 and 390.05."""
    assert [c.stop - c.start for c in cut([1.0] * 400, 6, 10)] == [100, 96, 85, 67, 43, 9]
