"""The real files beside the repository, where there are any; small ones only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.data import partition, sources
from fedsim.errors import DataError

pytest.importorskip("pyarrow")


def test_mnist_with_its_writers(real):
    data = sources.mnist(real("mnist"), ids="writers")
    assert data.train.x.shape == (60_000, 1, 28, 28) and len(data.test) == 10_000
    x = data.normalize(data.train.x[:5000], torch.float32)
    assert abs(float(x.mean())) < 0.03 and abs(float(x.std()) - 1) < 0.03
    writers = np.unique(data.ids)
    assert len(writers) == 539 and not set(writers) & set(data.groups["test"]["writer"])
    parts = partition.natural(data.train.y.numpy(), 539, np.random.default_rng(0), ids=data.ids)
    assert (min(map(len, parts)), max(map(len, parts)), np.median([*map(len, parts)])) == (19, 131, 116)
    small = sources.mnist(real("mnist"), ids="writers", subset=100)
    assert len(small.ids) == 100 and np.array_equal(small.ids, small.groups["train"]["writer"])


def test_fashion_mnist(real):
    data = sources.fashion_mnist(real("fashion_mnist"))
    assert np.bincount(data.train.y).tolist() == [6000] * 10 and data.classes[9] == "Ankle boot"


def test_cifar10_test_file(real):
    data = sources.cifar10(real("cifar10") / "test-00000-of-00001.parquet")
    assert np.bincount(data.train.y).tolist() == [1000] * 10
    x = data.normalize(data.train.x, torch.float32)
    assert x.mean((0, 2, 3)).abs().max() < 0.05 and (x.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_heart_disease_is_standardised_by_hospital_ids(real):
    data = sources.heart_disease(real("heart_disease"))
    assert data.train.x.shape == (613, 13) and len(data.test) == 307
    assert (
        data.train.x.mean(0).abs().max() < 1e-5 and (data.train.x.std(0, correction=0) - 1).abs().max() < 1e-5
    )
    assert data.group_names["hospital"] == ("cleveland", "hungarian", "switzerland", "va")
    drop = sources.heart_disease(real("heart_disease") / "heart_disease.csv", missing="drop")
    both = np.concatenate((drop.ids, drop.groups["test"]["hospital"]))
    assert np.bincount(both).tolist() == [303, 261, 46, 130]  # FLamby's Fed-Heart-Disease
    with pytest.raises(DataError, match=r"data\.path=<folder>"):
        sources.heart_disease(None)


def test_bad_heart_disease(tmp_path):
    (tmp_path / "heart_disease.csv").write_text("hospital,age\nva,63\n")
    with pytest.raises(DataError, match=r"heart_disease\.csv cannot be read \(KeyError: 'sex'\)"):
        sources.heart_disease(tmp_path)


@pytest.mark.parametrize(("what", "features", "domains"), [("surf", 800, 4), ("googlenet", 1024, 3)])
def test_office_features(real, what, features, domains):
    data = sources.office_caltech10(real("office_caltech10"), what=what, test_folds=[0, 1, 2])
    assert data.train.x.shape[1] == features and data.train.x.dtype == torch.float32
    assert len(data.group_names["domain"]) == domains and data.num_classes == 10
    share = len(data.test) / (len(data.train) + len(data.test))
    assert abs(share - 0.3) < 0.02
    names = ["webcam", "amazon"]
    two = sources.office_caltech10(real("office_caltech10"), what=what, domains=names)
    assert two.group_names["domain"] == tuple(names) and set(two.ids) == {0, 1}
    with pytest.raises(DataError, match="has the domains"):
        sources.office_caltech10(real("office_caltech10"), what=what, domains=["webcam", "nowhere"])
    with pytest.raises(DataError, match="test_folds"):
        sources.office_caltech10(real("office_caltech10"), what=what, test_folds=[10])


def test_office_images(real):
    data = sources.office_caltech10(real("office_caltech10"), size=32, augment=True)
    both = np.concatenate((data.ids, data.groups["test"]["domain"]))
    assert np.bincount(both).tolist() == [958, 1123, 157, 295]
    assert data.input_shape == (3, 32, 32) and data.classes[0] == "backpack"
    batch = data.augment(data.train.x[:4], torch.Generator().manual_seed(0))
    assert batch.shape == (4, 3, 32, 32) and batch.dtype == torch.uint8


def test_shakespeare(real):
    data = sources.shakespeare(real("shakespeare"), window=80, stride=80, min_chars=1000, test_fraction=0.2)
    assert len(np.unique(data.ids)) == 641 and data.num_classes == 72
    assert data.train.x.shape[1:] == (80,) and data.train.x.dtype == torch.int64
