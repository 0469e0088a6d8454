"""Shards: views, counts, files; and the part each client holds out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.shards import Shards, Stated, holdout
from fedsim.errors import DataError


def example():
    return Shards.of([np.array([0, 4]), np.array([], dtype=np.int64), np.array([1, 2, 3])])


def test_parts_sizes_and_counts():
    shards = example()
    assert len(shards) == 3
    assert shards.sizes.tolist() == [2, 0, 3]
    assert shards.part(2).tolist() == [1, 2, 3]
    assert shards.part(2).base is not None
    assert shards.counts(np.array([1, 0, 0, 1, 1]), 2).tolist() == [[0, 2], [0, 0], [2, 1]]
    with pytest.raises(IndexError, match="client 3 of 3"):
        shards.part(3)
    assert len(Shards.of([])) == 0


def test_hash_tells_partitions_apart_and_survives_a_file(tmp_path):
    shards = example()
    shards.save(tmp_path / "p.npz")
    loaded = Shards.load(tmp_path / "p.npz")
    assert loaded.hash() == shards.hash() and len(shards.hash()) == 64
    assert Shards.of([np.array([0]), np.array([4])]).hash() != Shards.of([np.array([0, 4])]).hash()
    (tmp_path / "p.npz").write_bytes(b"PK torn")
    with pytest.raises(DataError, match=r"p\.npz"):
        Shards.load(tmp_path / "p.npz")


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2], [0, 3, 2], []])
def test_impossible_offsets_are_refused(offsets):
    with pytest.raises(DataError, match="offsets"):
        Shards(np.arange(2), np.array(offsets, dtype=np.int64))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8), fraction=st.floats(0.01, 0.9))
def test_holdout_splits_every_client(sizes, fraction):
    ends = np.cumsum([0, *sizes])
    shards = Shards(np.arange(ends[-1]), ends)
    train, test = holdout(shards, fraction, np.random.default_rng)
    for client, size in enumerate(sizes):
        expected = max(int(fraction * size), 1) if size >= 2 else 0
        assert test.sizes[client] == expected
        both = np.concatenate((train.part(client), test.part(client)))
        np.testing.assert_array_equal(np.sort(both), shards.part(client))


def test_holdout_of_nothing_and_of_repeated_samples():
    train, test = holdout(example(), 0.0, np.random.default_rng)
    assert train.hash() == example().hash() and test.sizes.tolist() == [0, 0, 0]
    train, test = holdout(Shards.of([np.array([3, 3, 3, 5, 5, 5])]), 0.5, np.random.default_rng)
    assert len(test.part(0)) == 1 and len(train.part(0)) == 3
    assert not set(train.part(0)) & set(test.part(0))
    with pytest.raises(DataError, match="0 <= fraction < 1"):
        holdout(example(), 1.0, np.random.default_rng)


def test_what_is_said_takes_no_memory_and_is_kept(tmp_path: Path) -> None:
    """A thousand times more samples than memory could name."""
    held = np.array([[10**12, 3], [0, 0], [5, 10**13]])
    said = Stated.of_counts(held)
    assert (
        said.sizes.tolist() == [10**12 + 3, 0, 10**13 + 5] and said.size(2) == 10**13 + 5 and len(said) == 3
    )
    assert said.part(0).tolist() == [0] * 8 + [1] * 3 and said.part(1).tolist() == []
    assert (said.counts(np.arange(2), 2) == held).all()
    assert said.only(np.array([True, True, False])).sizes.tolist() == [10**12 + 3, 0, 0]
    said.save(tmp_path / "partition.npz")
    back = Shards.load(tmp_path / "partition.npz")
    assert (
        back.sizes.tolist() == said.sizes.tolist()
        and back.hash() == said.hash() != Stated.of_counts(held + 1).hash()
    )
