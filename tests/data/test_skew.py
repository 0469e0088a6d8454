"""Label skew and size imbalance, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from fedsim.data.shards import Shards
from fedsim.data.skew import LabelSkew, skew_of_counts, skew_of_shards
from fedsim.errors import DataError


def test_two_clients_of_one_class_each():
    found = skew_of_counts(np.array([[4, 0], [0, 4]]))  # p = (1, 0), q = (1/2, 1/2), (p+q)/2 = (3/4, 1/4)
    js = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    assert found.js == pytest.approx([js, js]) and js == pytest.approx(0.311278, abs=1e-6)
    assert found.emd == pytest.approx([1, 1])  # |1 - 1/2| + |0 - 1/2|
    hellinger = math.sqrt(((1 - math.sqrt(0.5)) ** 2 + 0.5) / 2)
    assert found.hellinger == pytest.approx([hellinger] * 2) and hellinger == pytest.approx(
        0.541196, abs=1e-6
    )


def test_a_small_client_among_large_ones():
    # q = (6, 3, 1) / 10; p of client 1 = (0, 0, 1)
    found = skew_of_counts(np.array([[6, 3, 0], [0, 0, 1], [0, 0, 0]]))
    assert found.sizes.tolist() == [9, 1, 0]
    assert found.emd[:2] == pytest.approx([abs(2 / 3 - 0.6) + abs(1 / 3 - 0.3) + 0.1, 0.6 + 0.3 + 0.9])
    mid = (1 + 0.1) / 2
    assert found.js[1] == pytest.approx((math.log2(1 / mid) + 0.1 * math.log2(0.1 / mid) + 0.9) / 2)
    assert found.hellinger[1] == pytest.approx(math.sqrt(1 - math.sqrt(0.1)))
    assert all(math.isnan(values[2]) for values in (found.js, found.emd, found.hellinger))
    summary = found.summary()
    assert summary["emd"] == pytest.approx(np.mean(found.emd[:2]))
    assert (summary["smallest"], summary["largest"], summary["empty"]) == (0, 9, 1)
    sizes = np.array([9, 1, 0])
    assert summary["size_cv"] == pytest.approx(sizes.std() / sizes.mean())


def test_the_same_labels_everywhere_are_at_distance_zero():
    summary = skew_of_counts(np.tile([3, 1, 5], (4, 1))).summary()
    assert summary == pytest.approx(
        {"js": 0, "emd": 0, "hellinger": 0, "size_cv": 0, "smallest": 9, "largest": 9, "empty": 0}, abs=1e-7
    )


def test_shards_give_what_their_counts_give():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500)
    owner = rng.choice(12, 500, p=rng.dirichlet(np.full(12, 0.3)))
    shards = Shards.of([np.flatnonzero(owner == client) for client in range(12)])
    counts = shards.counts(labels, 7)
    mine, dense = skew_of_shards(shards, labels, 7), skew_of_counts(counts)
    p, q = (c / c.sum(axis=-1, keepdims=True) for c in (counts[counts.sum(1) > 0], counts.sum(0)))
    held = mine.sizes > 0
    assert mine.emd[held] == pytest.approx(np.abs(p - q).sum(1))
    for name in ("sizes", "js", "emd", "hellinger"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(dense, name))


def test_bounds_and_what_a_file_keeps(tmp_path):
    found = skew_of_counts(
        np.eye(1000, dtype=int)
    )  # everyone a class of one's own: nearly disjoint from the rest
    assert 0.99 < found.js.max() < 1 and 1.99 < found.emd.max() < 2 and 0.98 < found.hellinger.max() < 1
    found.save(tmp_path / "skew.npz")
    np.testing.assert_array_equal(LabelSkew.load(tmp_path / "skew.npz").js, found.js)
    (tmp_path / "skew.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="expected arrays sizes, js, emd, hellinger"):
        LabelSkew.load(tmp_path / "skew.npz")
    assert skew_of_counts(np.zeros((2, 3), dtype=int)).summary()["empty"] == 2
