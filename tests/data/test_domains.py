"""Multi-domain data: splits with clients inside domains, per-domain test sets and metrics, sources of such data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.data import bydomain, partition, sources
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError, DataError
from fedsim.task.evaluation import over_domains

IDS = np.repeat([0, 1, 2], [60, 90, 30])
LABELS = np.tile([0, 1, 2], 60)


def split(num_clients=5, seed=0, **options):
    return bydomain.domains(LABELS, num_clients, np.random.default_rng(seed), ids=IDS, **options)


def table(parts):
    return np.array([np.bincount(LABELS[part], minlength=3) for part in parts])


def test_clients_are_numbered_domain_by_domain_and_use_every_sample():
    for options in ({}, {"alpha": 0.1}, {"clients": [1, 3, 1], "alpha": 0.5, "per_class": 2}):
        parts = split(**options)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
        assert [len(set(IDS[part])) for part in parts] == [1] * 5
        owners = [int(IDS[part][0]) for part in parts]
        assert owners == ([0, 1, 1, 1, 2] if "clients" in options else [0, 1, 1, 2, 2])
    assert table(parts).min() >= 2
    again = split(clients=[1, 3, 1], alpha=0.5, per_class=2)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_skew_across_clients_is_office_home_lds():
    """One client per domain: floor(q n) of each class, with q summing to one over the clients."""
    parts = split(3, alpha=0.3, skew="across", min_samples=0)
    q = np.random.default_rng(0).dirichlet([0.3] * 3, 3).T
    totals = np.array([[20, 20, 20], [30, 30, 30], [10, 10, 10]])
    np.testing.assert_array_equal(table(parts), np.floor(q * totals))
    kept = split(6, alpha=0.3, skew="across", per_class=1)
    assert table(kept).min() == 1
    assert len(np.concatenate(kept)) == len(np.unique(np.concatenate(kept)))


def test_share_uses_a_part_of_each_domain():
    parts = split(3, share=0.1)
    assert [len(part) for part in parts] == [6, 9, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 2}, "3 domains; type num_clients=3"),
        ({"clients": [2, 2, 2]}, r"clients=\[2, 2, 2\].*add up to num_clients \(5\)"),
        ({"skew": "sideways"}, "within or across"),
        ({"share": 0.0}, "0 < share <= 1"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 0.1, "per_class": 6}, "class 0 has 10 samples"),
        ({"alpha": 0.01, "skew": "across", "min_samples": 5}, "client . would have"),
    ],
)
def test_what_cannot_be_split_is_named(options, message):
    with pytest.raises(DataError, match=message):
        split(**{"num_clients": 5, **options})


def test_without_domains_another_partition_is_named():
    with pytest.raises(DataError, match="partition=dirichlet"):
        bydomain.domains(LABELS, 3, np.random.default_rng(0), ids=None)


def test_every_client_gets_a_sample_of_every_class():
    labels = np.repeat(np.arange(4), 20)
    parts = partition.dirichlet(labels, 10, np.random.default_rng(0), alpha=0.01, min_samples=2, per_class=1)
    counts = np.array([np.bincount(labels[part], minlength=4) for part in parts])
    assert counts.min() == 1 and counts.sum() == 80
    with pytest.raises(DataError, match=r"per_class=3 for 10 clients: class 0 has 20"):
        partition.dirichlet(labels, 10, np.random.default_rng(0), alpha=1, min_samples=2, per_class=3)
    with pytest.raises(DataError, match="balanced=false"):
        partition.dirichlet(
            labels, 10, np.random.default_rng(0), alpha=1, min_samples=2, per_class=1, balanced=True
        )


def two_domains():
    x = torch.arange(12.0).view(6, 2)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    train, test = np.array([0, 0, 1, 1, 1, 0]), np.array([1, 0, 1, 0, 1, 1])
    return Dataset(
        Samples(x, y),
        Samples(x, y),
        classes=("a", "b"),
        groups={"train": {"domain": train}, "test": {"domain": test}},
        group_names={"domain": ("photo", "sketch", "empty")},
    )


def test_domains_of_clients_and_their_test_samples():
    shards = Shards.of([np.array(part) for part in ([0, 1, 5], [2, 3], [], [1, 4])])
    data = FederatedData(two_domains(), shards)
    assert data.client_domains.tolist() == [0, 1, -1, -1]  # none without samples, none with both domains
    assert data.domain_names == ["photo", "sketch", None, None]
    assert data.test_rows.tolist() == [1, 3, 0, 2, 4, 5]
    assert data.test_domains == {"photo": slice(0, 2), "sketch": slice(2, 6)}
    assert data.domain_test(0, torch.float32).everything().x.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert data.domain_test(3, torch.float32) is None
    assert data.client_holdout(0, torch.float32) is None
    measured = FederatedData(two_domains(), shards, own_domain=True)
    assert len(measured.client_holdout(1, torch.float32)) == 4


def test_mean_and_spread_over_domains():
    found = over_domains({"a": {"accuracy": 0.2}, "b": {"accuracy": 0.8}})
    assert found["domain/a/accuracy"] == 0.2
    assert found["domains/accuracy"] == 0.5
    assert found["domains/accuracy_std"] == pytest.approx(0.3)
    assert over_domains({}) == {}


class Fixed(nn.Module):
    """Says class 1 where the first feature is positive; its one parameter changes nothing."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], dim=1) + 0 * self.w


def test_a_run_reports_each_domain_on_every_engine_size():
    ones, pair = torch.ones(4, 1), (torch.ones(2, 1), torch.tensor([0, 1]))
    right, wrong = torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 0])
    settings = [
        "engine=serial",
        "tracker=quiet",
        "rounds=1",
        "clients_per_round=3",
        "evaluation.batch_size=3",
    ]
    result = fedsim.simulate(
        [*settings, "evaluation.clients_every=1", "evaluation.clients_on=domain"],
        model=Fixed(),
        clients=[pair] * 3,
        domains=["sketch", "photo", "sketch"],
        test={"sketch": (ones, wrong), "photo": (torch.ones(8, 1), torch.cat((right, right)))},
    )
    row = result.rows[-1]
    assert row["domain/photo/accuracy"] == 1 and row["domain/sketch/accuracy"] == 0
    assert row["domains/accuracy"] == 0.5 and row["domains/accuracy_std"] == 0.5
    assert row["accuracy"] == pytest.approx(8 / 12)
    assert row["clients/accuracy"] == pytest.approx(1 / 3)
    assert row["clients/domain/sketch/accuracy"] == 0 and row["clients/domains/accuracy"] == 0.5


def test_domains_must_fit_the_clients():
    pair = (torch.ones(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="2 names for 1 clients"):
        fedsim.simulate(["engine=serial"], model=Fixed(), clients=[pair], domains=["a", "b"])
    with pytest.raises(ConfigError, match="needs domains"):
        fedsim.simulate(["engine=serial"], model=Fixed(), clients=[pair], test={"a": pair})
    settings = [
        "engine=serial",
        "tracker=quiet",
        "evaluation.clients_every=1",
        "evaluation.clients_on=domain",
        "clients_per_round=1",
    ]
    with pytest.raises(ConfigError, match="no test samples with domains"):
        fedsim.simulate(settings, model=Fixed(), clients=[pair])


def test_distorted_digits_show_each_digit_to_one_camera():
    data = sources.distorted_digits()
    assert data.domains == ("blurred", "inverted", "plain", "turned")
    plain = sources.digits()
    first = {name: int(np.flatnonzero(data.domain("train") == i)[0]) for i, name in enumerate(data.domains)}
    x, source = data.train.x, plain.train.x
    assert torch.equal(x[first["plain"]], source[first["plain"]])
    assert torch.equal(x[first["inverted"]], 16 - source[first["inverted"]])
    assert torch.equal(x[first["turned"]], source[first["turned"]].rot90(1, (1, 2)))
    row = source[first["blurred"]][0].float()
    assert float(x[first["blurred"]][0, 3, 3]) == pytest.approx(float(row[2:5, 2:5].mean()), abs=0.5)
    assert max(np.bincount(data.domain("train"))) - min(np.bincount(data.domain("train"))) <= 10
    only = sources.distorted_digits(domains=["turned", "plain"])
    assert only.domains == ("turned", "plain") and set(only.ids) == {0, 1}


def write(folder, colours):
    image = pytest.importorskip("PIL.Image")
    for domain, shade in colours.items():
        for label, red in (("bike", 10), ("mug", 200)):
            (folder / domain / label).mkdir(parents=True)
            for i in range(10):
                image.new("RGB", (6, 5), (red, shade, i)).save(folder / domain / label / f"{i}.png")


def test_folders_of_domains_and_classes(tmp_path):
    write(tmp_path / "office", {"amazon": 0, "webcam": 90})
    data = sources.domain_images(tmp_path / "office", size=8, test_folds=[0])
    assert data.domains == ("amazon", "webcam") and data.classes == ("bike", "mug")
    assert data.train.x.shape == (36, 3, 8, 8) and len(data.test) == 4
    for x, y, domain in zip(data.train.x, data.train.y, data.domain("train"), strict=True):
        assert int(x[0, 0, 0]) == (10, 200)[int(y)] and int(x[1, 0, 0]) == (0, 90)[domain]
    with pytest.raises(DataError, match="holds no images"):
        sources.domain_images(tmp_path)
    with pytest.raises(DataError, match=r"data\.path=<folder>, holding <domain>/<class>"):
        sources.domain_images(None)
    with pytest.raises(DataError, match="no known name on the hub"):
        sources.digits5(None, domains=["syn"])


def test_domains_that_share_no_class_are_refused(tmp_path):
    write(tmp_path / "a", {"one": 0})
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    write(tmp_path / "a", {"one": 0})
    for name in ("bike", "mug"):
        (tmp_path / "a" / "two" / name).rename(tmp_path / "a" / "two" / f"{name}2")
    with pytest.raises(DataError, match="share no class"):
        sources.domain_images(tmp_path / "a", size=8)


def test_digits5_from_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for where in ("train", "test"):
        for domain in ("mnist", "syn"):
            for label in range(10):
                (tmp_path / where / domain / str(label)).mkdir(parents=True)
                image.new("L", (4, 4), 20 * label).save(tmp_path / where / domain / str(label) / "0.png")
    data = sources.digits5(tmp_path, size=8)
    assert data.domains == ("mnist", "syn") and data.num_classes == 10
    assert torch.equal(data.train.x[:, 0, 0, 0], 20 * data.train.y.to(torch.uint8))


def test_real_domains_split_over_clients(real):
    pytest.importorskip("pyarrow")
    data = sources.domain_images(real("pacs"), size=16, test_folds=[0, 1, 2])
    assert data.domains == ("art_painting", "cartoon", "photo", "sketch") and data.num_classes == 7
    parts = bydomain.domains(
        data.train.y.numpy(), 8, np.random.default_rng(0), ids=data.ids, alpha=0.1, share=0.3
    )
    federated = FederatedData(data, Shards.of(parts))
    assert federated.client_domains.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    sizes = {name: part.stop - part.start for name, part in federated.test_domains.items()}
    assert sum(sizes.values()) == len(data.test)
    assert 0.28 < sizes["sketch"] / 3929 < 0.32
