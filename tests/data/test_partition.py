"""Partitions: hand-checked small cases, properties on random ones, and other libraries' partitioners."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import dealing, partition
from fedsim.errors import DataError

SPLITS = {
    "iid": partition.iid,
    "dirichlet": partial(partition.dirichlet, alpha=0.1, min_samples=1),
    "shards": partial(partition.shards, shards_per_client=2),
    "quantity": partial(partition.quantity, alpha=0.2, min_samples=1),
}


def seeded(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_sample_goes_to_exactly_one_client(name, data):
    clients = data.draw(st.integers(1, 12))
    total = data.draw(st.integers(2 * clients, 200))
    classes = data.draw(st.integers(1, 8))
    seed = data.draw(st.integers(0, 2**32 - 1))
    labels = seeded(seed).integers(classes, size=total)
    parts = SPLITS[name](labels, clients, seeded(seed))
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() and len(part) >= 1 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(total))
    again = SPLITS[name](labels, clients, seeded(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(map(len, partition.iid(np.zeros(11, int), 4, seeded()))) == [2, 3, 3, 3]
    assert sum(map(len, partition.iid(np.zeros(2, int), 4, seeded()))) == 2


@settings(max_examples=30, deadline=None)
@given(
    clients=st.integers(1, 20), minimum=st.integers(0, 5), extra=st.integers(0, 30), seed=st.integers(0, 999)
)
def test_minimum_is_kept_even_when_draws_cannot(clients, minimum, extra, seed):
    labels = seeded(seed).integers(3, size=clients * minimum + extra + 1)
    for split in (partition.dirichlet, partition.quantity):
        parts = split(labels, clients, seeded(seed), alpha=0.01, min_samples=minimum)
        assert min(map(len, parts)) >= minimum
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


def test_repair_takes_the_largest_clients_commonest_class():
    counts = np.array([[5, 1], [0, 0], [2, 2]])
    repaired = dealing.with_minimum(lambda: counts.copy(), 2)
    np.testing.assert_array_equal(repaired, [[3, 1], [2, 0], [2, 2]])


def test_dirichlet_proportions_follow_alpha():
    labels = np.repeat(np.arange(10), 1000)

    def spread(alpha):
        shards = partition.Shards.of(partition.dirichlet(labels, 20, seeded(), alpha=alpha, min_samples=0))
        return shards.counts(labels, 10).std()

    # a share of Dir_m(a) has variance (m - 1) / (m^2 (m a + 1)); times 1000 samples of a class
    for alpha in (0.1, 1.0, 100.0):
        assert spread(alpha) == pytest.approx(1000 * (19 / 400 / (20 * alpha + 1)) ** 0.5, rel=0.2)


def test_balanced_dirichlet_is_equal_sized_and_reuses_classes():
    labels = np.array([0] * 8 + [1] * 992)
    parts = partition.dirichlet(labels, 10, seeded(), alpha=1.0, min_samples=2, balanced=True)
    assert [len(part) for part in parts] == [100] * 10
    rare = np.concatenate(parts)
    uses = np.bincount(rare[labels[rare] == 0], minlength=8)[:8]
    assert uses.sum() > 8
    assert uses.max() - uses.min() <= 1


def test_shards_are_cut_from_sorted_labels():
    labels = np.tile(np.arange(4), 5)
    one = partition.shards(labels, 4, seeded(), shards_per_client=1)
    assert sorted(labels[part].tolist() for part in one) == [[k] * 5 for k in range(4)]

    labels = np.repeat(np.arange(10), 60)  # 20 shards of 30: half a class each
    two = partition.shards(labels, 10, seeded(), shards_per_client=2)
    counts = partition.Shards.of(two).counts(labels, 10)
    assert set(counts.ravel()) <= {0, 30, 60} and (counts.sum(axis=1) == 60).all()
    assert (counts == 30).any()


IDS = np.array([7, 7, 7, 2, 2, 9, 4, 4, 4, 4])


@pytest.mark.parametrize(
    ("clients", "choose", "expected"),
    [
        (4, "merge", [[3, 4], [6, 7, 8, 9], [0, 1, 2], [5]]),
        (2, "merge", [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]),
        (2, "largest", [[6, 7, 8, 9], [0, 1, 2]]),
    ],
)
def test_natural_ids_by_hand(clients, choose, expected):
    parts = partition.natural(np.zeros(10, int), clients, seeded(), ids=IDS, choose=choose)
    assert [part.tolist() for part in parts] == expected


def test_natural_random_choice_and_minimum():
    parts = partition.natural(np.zeros(10, int), 2, seeded(3), ids=IDS, choose="random", min_samples=2)
    assert all(len(set(IDS[part])) == 1 and len(part) == (IDS[part[0]] == IDS).sum() for part in parts)
    with pytest.raises(DataError, match=r"3 natural ids with at least 2.*num_clients=3"):
        partition.natural(np.zeros(10, int), 4, seeded(), ids=IDS, min_samples=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda y: partition.iid(y, 0, seeded()), "num_clients=0"),
        (
            lambda y: partition.dirichlet(y.astype(float), 2, seeded(), alpha=1, min_samples=1),
            "integers.*float64 of shape.*type partition=iid",
        ),
        (
            lambda y: partition.dirichlet(y, 5, seeded(), alpha=1, min_samples=3),
            "needs 15 samples, there are 10",
        ),
        (lambda y: partition.dirichlet(y, 5, seeded(), alpha=0, min_samples=0), "alpha=0"),
        (lambda y: partition.shards(y, 5, seeded(), shards_per_client=3), "15 shards.*at most 2"),
        (lambda y: partition.natural(y, 2, seeded(), ids=None), "no natural ids"),
        (lambda y: partition.natural(y, 2, seeded(), ids=y, choose="best"), "'merge', 'largest' or 'random'"),
    ],
)
def test_bad_options_are_named(call, words):
    with pytest.raises(DataError, match=words):
        call(np.arange(10) % 2)


def test_speed_at_scale(rng):
    labels = rng.integers(10, size=1_000_000)
    start = time.process_time()
    shards = partition.Shards.of(partition.iid(labels, 1_000_000, seeded()))
    assert (shards.sizes == 1).all()
    assert time.process_time() - start < 6  # about 1 s alone on a core


class Interleaved:
    """What flwr-datasets offers: row i of the data set goes to partition i mod n."""

    def __init__(self, total, partitions, column="index", shift=0):
        self.num_partitions = partitions
        self._total, self._column, self._shift = total, column, shift

    def load_partition(self, partition_id):
        rows = np.arange(partition_id, self._total, self.num_partitions) + self._shift
        return {self._column: rows.tolist()}


def test_adapter_takes_any_partitioner(rng):
    parts = partition.from_partitioner(np.zeros(7, int), 3, rng, partitioner=Interleaved(7, 3))
    assert [part.tolist() for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Interleaved(7, 4), "makes 4 partitions"),
        (Interleaved(7, 3, column="row"), "no integer column 'index'"),
        (Interleaved(7, 3, shift=1), "positions 0 to 6"),
    ],
)
def test_adapter_names_what_is_wrong(rng, bad, words):
    with pytest.raises(DataError, match=words):
        partition.from_partitioner(np.zeros(7, int), 3, rng, partitioner=bad)


def test_adapter_with_flwr_datasets(rng):
    flwr = pytest.importorskip("flwr_datasets.partitioner")
    labels = np.arange(200) % 4
    splitter = flwr.DirichletPartitioner(num_partitions=5, partition_by="label", alpha=1.0, seed=1)
    parts = partition.from_partitioner(labels, 5, rng, partitioner=splitter)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(200))
