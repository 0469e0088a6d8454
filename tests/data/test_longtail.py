"""Long tails: profiles and groups of the specification, local tests, and both on real data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config.compose import compose
from fedsim.data import partition, sources
from fedsim.data.longtail import by_class, class_groups, local_tests, long_tail, profile
from fedsim.errors import ConfigError, DataError
from fedsim.run import samples


@pytest.mark.parametrize(
    ("classes", "largest", "imbalance", "total", "groups"),
    [
        (10, 5000, 0.02, 13_996, (4, 3, 3)),
        (10, 5000, 0.01, 12_406, (3, 3, 4)),
        (100, 500, 0.02, 12_608, (34, 34, 32)),
        (100, 500, 0.01, 10_847, (30, 31, 39)),
    ],
)
def test_profiles_of_cifar_in_both_conventions(classes, largest, imbalance, total, groups):
    counts = profile(largest, classes, imbalance)
    assert counts.sum() == total and counts[0] == largest
    np.testing.assert_array_equal(counts, profile(largest, classes, round(1 / imbalance)))
    assert (np.diff(counts) <= 0).all()
    assert tuple(np.bincount(class_groups(counts), minlength=3)) == groups


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ([75, 20, 5], [0, 1, 2]),
        ([74, 21, 5], [0, 0, 2]),
        ([5, 75, 20], [2, 0, 1]),
        ([10, 10, 10, 10], [0, 0, 0, 1]),
        ([0, 7, 0], [2, 0, 2]),
        ([0, 0], [2, 2]),
        ([3], [0]),
    ],
)
def test_groups_by_hand(counts, groups):
    assert class_groups(np.array(counts)).tolist() == groups


@given(counts=st.lists(st.integers(0, 500), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_groups_are_the_shortest_prefixes(counts):
    counts = np.array(counts)
    groups = class_groups(counts)
    order = np.argsort(-counts, kind="stable")
    assert (np.diff(groups[order]) >= 0).all()
    if counts.sum():
        for share, last in ((75, 0), (95, 1)):
            inside = counts[groups <= last]
            assert 100 * inside.sum() >= share * counts.sum()
            assert 100 * (inside.sum() - inside.min()) < share * counts.sum()
        assert (groups[counts == 0] == 2).all()


def test_a_tail_of_the_digits():
    data = sources.digits()
    tail = long_tail(data, 50, 110)
    counts = np.bincount(tail.train.y, minlength=10)
    np.testing.assert_array_equal(counts, profile(110, 10, 0.02))
    assert len(tail.test) == len(data.test)
    pixels = {x.numpy().tobytes() for x in data.train.x}
    kept = [x.numpy().tobytes() for x in tail.train.x]
    assert set(kept) <= pixels
    again = long_tail(sources.digits(), 0.02, 110)
    assert torch.equal(again.train.x, tail.train.x)
    assert np.bincount(long_tail(data, 10).train.y)[0] == np.bincount(data.train.y).min()


def test_columns_of_samples_go_with_them():
    data = sources.digits()
    rows = np.arange(len(data.train))
    data = replace(data, ids=rows, groups={"train": {"row": rows}})
    tail = long_tail(data, 20)
    np.testing.assert_array_equal(tail.ids, tail.groups["train"]["row"])
    assert torch.equal(data.train.y[torch.from_numpy(tail.ids)], tail.train.y)


def test_impossible_tails_are_named():
    data = sources.digits()
    with pytest.raises(DataError, match=r"data.largest=5000: class 0 \(0\) should keep 5000 of \d+ samples"):
        long_tail(data, 10, 5000)
    with pytest.raises(DataError, match=r"data.imbalance=-1"):
        long_tail(data, -1)
    with pytest.raises(DataError, match="no class labels"):
        long_tail(replace(data, classes=()), 10)
    with pytest.raises(DataError, match=r"data.largest=9.*give data.imbalance too"):
        samples.dataset(compose(["data.largest=9"]))


def test_the_options_reach_any_data_and_any_partition():
    for cut in ("iid", "shards", "dirichlet"):
        config = compose(
            ["data.imbalance=50", "data.largest=110", f"partition={cut}", "evaluation.local_test=true"]
        )
        split = samples.split(config, samples.dataset(config))
        np.testing.assert_array_equal(split.all_counts(), profile(110, 10, 50))
        assert len(split.local_test) == split.num_clients
        assert sum(split.class_counts(i).sum() for i in range(20)) == profile(110, 10, 50).sum()


def test_sampled_dirichlet_draws_every_sample_on_its_own():
    """Counts of a class given its proportions are multinomial, and clients may stay empty."""
    labels = np.repeat([0, 1], [400, 100])
    rng = np.random.default_rng(0)
    options = {"alpha": 1e4, "min_samples": 0}
    counts = np.array(
        [[len(p) for p in partition.dirichlet(labels, 5, rng, **options, sampled=True)] for _ in range(200)]
    )
    assert (counts.sum(axis=1) == 500).all()
    assert counts.mean() == 100 and counts.var(axis=0).mean() == pytest.approx(500 * 0.2 * 0.8, rel=0.2)
    rounded = np.array([[len(p) for p in partition.dirichlet(labels, 5, rng, **options)] for _ in range(50)])
    assert rounded.var(axis=0).mean() < 10
    few = partition.dirichlet(np.zeros(3, int), 10, rng, alpha=0.5, min_samples=0, sampled=True)
    assert sum(map(len, few)) == 3 and min(map(len, few)) == 0
    with pytest.raises(DataError, match=r"partition.sampled=true"):
        partition.dirichlet(labels, 5, rng, **options, sampled=True, balanced=True)


def test_local_tests_follow_each_clients_mix():
    counts = np.array([[30, 10, 0], [0, 0, 0], [40, 0, 20]])  # 100 in all
    labels = np.repeat([0, 1, 2], [20, 20, 10])
    parts = local_tests(counts, labels, lambda i: np.random.default_rng(i))
    found = parts.counts(labels, 3)
    np.testing.assert_array_equal(found, [[15, 5, 0], [0, 0, 0], [20, 0, 10]])
    assert all(len(set(parts.part(i))) == len(parts.part(i)) for i in range(3))
    assert set(parts.part(0)) & set(parts.part(2))  # clients overlap
    scarce = local_tests(
        np.array([[90, 10]]), np.repeat([0, 1], [10, 90]), lambda i: np.random.default_rng(i)
    )
    assert scarce.counts(np.repeat([0, 1], [10, 90]), 2).tolist() == [[10, 10]]  # 90 wanted, 10 there


def test_metrics_by_class_by_hand():
    groups = np.array([0, 0, 1, 2])
    sums = torch.tensor([[3, 1, 0, 0], [4, 2, 2, 0], [5, 1, 1, 1]])
    found = by_class(sums, groups)
    assert found["many/accuracy"] == pytest.approx(4 / 6)
    assert found["medium/accuracy"] == 0 and "few/accuracy" not in found
    f1 = np.array([6 / 9, 2 / 3, 0])
    assert found["macro_f1"] == pytest.approx(f1.mean())
    assert found["weighted_f1"] == pytest.approx((f1 * [4, 2, 2]).sum() / 8)


def test_local_tests_need_labels_and_exclude_a_holdout():
    with pytest.raises(ConfigError, match=r"evaluation.local_test=true: not together"):
        from fedsim.config.check import validate

        validate(compose(["evaluation.local_test=true", "evaluation.holdout=0.2"]))
    config = compose(["data=synthetic", "evaluation.local_test=true"])
    data = replace(samples.dataset(config), test=None)
    with pytest.raises(ConfigError, match=r"evaluation.local_test=true: needs a test set"):
        samples.split(config, data)


def test_cifar10_lt(real):
    data = long_tail(sources.cifar10(real("cifar10")), 50)
    assert len(data.train) == 13_996 and np.bincount(data.train.y)[-1] == 100
    rng = np.random.default_rng(0)
    shards = partition.Shards.of(
        partition.dirichlet(data.train.y.numpy(), 40, rng, alpha=0.5, min_samples=0, sampled=True)
    )
    counts = shards.counts(data.train.y.numpy(), 10)
    tests = local_tests(counts, data.test.y.numpy(), lambda i: np.random.default_rng(i))
    wanted = np.minimum((counts / 13_996 * 10_000).astype(int), 1000)
    np.testing.assert_array_equal(tests.counts(data.test.y.numpy(), 10), wanted)
