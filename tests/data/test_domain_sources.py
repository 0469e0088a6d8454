"""Multi-domain sources: the hub through a stand-in for its library, the real files beside the repository, offline."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest
import torch

from fedsim.data import sources
from fedsim.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")


def table(count, shade, **columns):
    """``count`` images of one shade whose red counts up, as the hub stores them."""
    cells = []
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (i, shade, 0)).save(out, "PNG")
        cells.append({"bytes": out.getvalue(), "path": None})
    return pa.table({"image": cells, **columns})


@pytest.fixture
def hub(monkeypatch):
    """The library ``datasets`` over tables put into the returned dictionary by (name, configuration, split)."""
    held = {}

    class Split:
        def __init__(self, key):
            self.key, self._fingerprint = key, str(key)

        def with_format(self, kind):
            return self

        def __getitem__(self, rows):
            return held[self.key]

    def load(name, config=None, *, split):
        if (name, config, split) not in held:
            raise ConnectionError(f"cannot reach {name}")
        return Split((name, config, split))

    library = types.ModuleType("datasets")
    library.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", library)
    return held


def test_four_domains_of_digits5_come_from_the_hub(hub):
    names = [("ylecun/mnist", None), ("Mike0307/MNIST-M", None), ("ufldl-stanford/svhn", "cropped_digits")]
    for shade, key in enumerate([*names, ("flwrlabs/usps", None)]):
        for split, count in (("train", 4), ("test", 2)):
            hub[(*key, split)] = table(count, shade, label=[(i + shade) % 10 for i in range(count)])
    data = sources.digits5(None, size=4)
    assert data.domains == ("mnist", "mnist_m", "svhn", "usps") and data.num_classes == 10
    assert len(data.train) == 16 and len(data.test) == 8
    for x, y, domain in zip(data.train.x, data.train.y, data.domain("train"), strict=True):
        assert int(x[1, 0, 0]) == domain and int(y) == int(x[0, 0, 0]) + domain
    two = sources.digits5(None, size=4, domains=["svhn", "mnist"])
    assert two.domains == ("svhn", "mnist") and len(two.train) == 8


@pytest.mark.parametrize(
    ("source", "name"), [("pacs", "flwrlabs/pacs"), ("office_home", "flwrlabs/office-home")]
)
def test_images_with_a_domain_column_come_from_the_hub(hub, source, name):
    hub[name, None, "train"] = table(40, 7, domain=["art", "photo"] * 20, label=[0] * 20 + [1] * 20)
    data = sources.domain_images(None, hub=name, size=4, test_folds=[0])
    assert data.domains == ("art", "photo") and (len(data.train), len(data.test)) == (36, 4)
    assert data.train.x.shape == (36, 3, 4, 4)


@pytest.mark.parametrize(
    "load",
    [
        lambda: sources.digits5(None),
        lambda: sources.digits5(None, domains=["mnist", "syn"]),
        lambda: sources.digits6(None),
        lambda: sources.pacs(None, hub="flwrlabs/pacs"),
        lambda: sources.domain_images(None, hub="flwrlabs/office-home"),
        lambda: sources.domain_images(None),
        lambda: sources.office_caltech10(None),
    ],
)
def test_without_network_the_error_says_what_to_type(hub, load):
    with pytest.raises(DataError, match=r"data\.path=<folder>, holding .*(<domain>/<class>|domain, label)"):
        load()


def test_digits6_is_read_by_both_loaders(real):
    data = sources.digits6(real("digits6"), size=4)
    assert data.domains == ("fonts", "mnist", "mnist_m", "scene", "semeion", "usps")
    assert np.bincount(data.domain("train")).tolist() == [6720, 5999, 5999, 621, 1274, 7291]
    assert np.bincount(data.domain("test")).tolist() == [1697, 1500, 1500, 264, 319, 2007]
    assert set(data.train.y.tolist()) == set(range(10))
    same = sources.digits5(real("digits6"), size=4, domains=["usps", "mnist"])
    rows = data.domain("train") == data.domains.index("usps")
    assert torch.equal(same.train.x[same.domain("train") == 0], data.train.x[torch.from_numpy(rows)])


def test_pacs_has_the_published_counts_and_its_own_folds(real):
    data = sources.pacs(real("pacs"), size=4, test_folds=[0])
    both = np.concatenate((data.domain("train"), data.domain("test")))
    assert data.domains == ("art_painting", "cartoon", "photo", "sketch")
    assert np.bincount(both).tolist() == [2048, 2344, 1670, 3929]
    assert data.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    fold = pq.read_table(next(real("pacs").glob("*.parquet")), columns=["fold"])["fold"].to_numpy()
    assert len(data.test) == int((fold == 0).sum())


def test_office_caltech_from_folders_is_the_same_as_from_parquet(real, tmp_path):
    """Every 30th image, put into the published layout; they are decoded to the same pixels."""
    rows = pq.read_table(next(real("office_caltech10").glob("images*.parquet")))
    names = sources.office_caltech10(real("office_caltech10"), size=16).classes
    chosen = list(range(0, len(rows), 30))
    for i, row in zip(chosen, rows.take(chosen).to_pylist(), strict=True):
        place = tmp_path / row["domain"] / names[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:05d}.jpg").write_bytes(row["image"]["bytes"])
    data = sources.office_caltech10(tmp_path, size=16, test_folds=[0])
    whole = sources.office_caltech10(real("office_caltech10"), size=16, test_folds=[0])
    assert data.domains == whole.domains and data.classes == names
    found = {x.numpy().tobytes() for part in (data.train, data.test) for x in part.x}
    known = {x.numpy().tobytes() for part in (whole.train, whole.test) for x in part.x}
    assert len(data.train) + len(data.test) == len(chosen) and found <= known
