"""Sources on files made here: what is read, what is cached, and what is said about bad input."""

from __future__ import annotations

import builtins
import gzip
import io
import sys
import types

import numpy as np
import pytest
import torch

from fedsim.data import sources
from fedsim.data.augment import Compose, Flip
from fedsim.data.cache import cached
from fedsim.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_images(file, arrays, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(a), "path": None} for a in arrays]
    pq.write_table(pa.table({"img": cells, **columns}), file)


@pytest.fixture
def colours(rng):
    return rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


def test_cifar_folder_is_decoded_exactly_and_cached(tmp_path, private_cache, colours):
    write_images(tmp_path / "c" / "train-0.parquet", colours[:4], label=[3, 1, 9, 3])
    write_images(tmp_path / "c" / "test-0.parquet", colours[4:], label=[0, 1])
    data = sources.cifar10(tmp_path / "c")
    assert data.train.x.dtype == torch.uint8 and data.input_shape == (3, 4, 4)
    np.testing.assert_array_equal(data.train.x.numpy(), colours[:4].transpose(0, 3, 1, 2))
    assert data.train.y.tolist() == [3, 1, 9, 3] and len(data.test) == 2
    assert data.num_classes == 10 and data.normalize.scale == 1 / 255

    first = {file: file.stat().st_mtime_ns for file in private_cache.rglob("*.npy")}
    again = sources.cifar10(tmp_path / "c")
    assert torch.equal(again.train.x, data.train.x)
    assert first and first == {file: file.stat().st_mtime_ns for file in private_cache.rglob("*.npy")}

    again.train.x[0] = 0  # copy-on-write: never reaches the cache
    write_images(tmp_path / "c" / "train-0.parquet", colours[:4][::-1], label=[3, 9, 1, 3])
    assert sources.cifar10(tmp_path / "c").train.y.tolist() == [3, 9, 1, 3]


def test_one_file_is_training_data_alone(tmp_path, colours):
    write_images(tmp_path / "some.parquet", colours, label=list(range(6)))
    assert sources.cifar10(tmp_path / "some.parquet").test is None


def test_torn_cache_entries_are_rebuilt(private_cache):
    def build():
        return {"x": np.arange(5)}

    cached("n", ["k"], build)
    (file,) = private_cache.rglob("x.npy")
    file.write_bytes(file.read_bytes()[:-8])
    assert cached("n", ["k"], build)["x"].tolist() == [0, 1, 2, 3, 4]
    assert not list(private_cache.glob(".*"))


def test_parquet_of_ones_own(tmp_path, colours):
    tall = [*colours, np.zeros((9, 5, 3), dtype=np.uint8)]
    write_images(tmp_path / "own.parquet", tall, kind=list("babacab"), who=list("xxyyzzx"))
    with pytest.raises(DataError, match=r"row 6: 5x9 pixels, row 0 has 4x4.*size="):
        sources.parquet(tmp_path / "own.parquet", image="img", label="kind")
    data = sources.parquet(tmp_path / "own.parquet", image="img", label="kind", ids="who", size=4)
    assert data.classes == ("a", "b", "c") and data.train.y.tolist() == [1, 0, 1, 0, 2, 0, 1]
    assert data.ids.tolist() == [0, 0, 1, 1, 2, 2, 0]
    x = data.train.x.double() / 255
    assert data.normalize.mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert data.normalize.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist())


def test_bad_parquet_is_named(tmp_path, colours):
    file = tmp_path / "train-0.parquet"
    with pytest.raises(DataError, match=r"nowhere does not exist; expected train-\*\.parquet.*data\.path="):
        sources.cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no train-\*\.parquet"):
        sources.cifar10(tmp_path)
    write_images(file, colours, klass=list(range(6)))
    with pytest.raises(DataError, match=r"train-0\.parquet has no column \['label'\]; its columns are"):
        sources.cifar10(tmp_path)
    write_images(file, colours, label=[0, 1, 2, 3, 4, 10])
    with pytest.raises(DataError, match="labels in 'label' must be 0 to 9"):
        sources.cifar10(tmp_path)
    pq.write_table(pa.table({"img": [b"no image"], "label": [1]}), file)
    with pytest.raises(DataError, match=r"train-0\.parquet, column 'img', row 0: not a readable image"):
        sources.cifar10(tmp_path)
    pq.write_table(pa.table({"img": [1], "label": [1]}), file)
    with pytest.raises(DataError, match="column 'img' is int64; expected encoded images"):
        sources.cifar10(tmp_path)
    file.write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"train-0\.parquet is not a readable Parquet file"):
        sources.cifar10(tmp_path)


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes())


def test_idx_files_and_their_damage(tmp_path, rng):
    x, y = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8)
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(x))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(y))
    data = sources.mnist(tmp_path)
    np.testing.assert_array_equal(data.train.x[:, 0].numpy(), x)
    assert data.train.y.dtype == torch.int64
    with pytest.raises(DataError, match=r"writers\.parquet does not exist"):
        sources.mnist(tmp_path, ids="writers")
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    for damage, words in (
        (idx(y[:3]), "has 5 images but"),
        (idx(x), "not an IDX file of 1 dimensions"),
        (idx(y)[:-9], "not a readable gzip file"),
        (b"plain", "not a readable gzip file"),
    ):
        labels.write_bytes(damage)
        with pytest.raises(DataError, match=words):
            sources.mnist(tmp_path)


def test_without_path_the_hub_is_asked(monkeypatch, colours):
    real_import = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(DataError, match=r"fedsim-lab\[hub\]', or pass data\.path=<folder>, holding train"):
        sources.cifar10()
    monkeypatch.undo()


def test_hub_tables_are_decoded(monkeypatch, colours):
    table = pa.table({"img": [{"bytes": png(a), "path": None} for a in colours], "label": list(range(6))})

    class Split:
        _fingerprint = "abc"

        def with_format(self, kind):
            assert kind == "arrow"
            return self

        def __getitem__(self, rows):
            assert rows == slice(None)
            return table

    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda name, split: {("uoft-cs/cifar10", s): Split() for s in ("train", "test")}[
        name, split
    ]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = sources.cifar10()
    np.testing.assert_array_equal(data.test.x.numpy(), colours.transpose(0, 3, 1, 2))

    def unreachable(name, split):
        raise ConnectionError("offline")

    hub.load_dataset = unreachable
    with pytest.raises(DataError, match=r"offline.*data\.path=<folder>"):
        sources.cifar10()


def test_without_network_the_hub_is_asked_once_and_the_cache_looked_into(monkeypatch, caplog):
    """Its library tries again for a minute; 192.0.2.1 is an address that nobody has (RFC 5737)."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr("fedsim.data.hub.PATIENCE", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    library, seen = types.ModuleType("datasets"), []

    def load(name, split):
        seen.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError(f"{name} is not cached\nand more")

    library.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.delitem(sys.modules, "datasets.config", raising=False)
    with pytest.raises(
        DataError, match=r"\(uoft-cs/cifar10 is not cached\); .* data\.path=<folder>, holding train"
    ):
        sources.cifar10()
    assert seen == [True] and constants.HF_HUB_OFFLINE is False and "does not answer" in caplog.text


def test_digits_subset_and_augment():
    data = sources.digits()
    assert (len(data.train), len(data.test), data.input_shape) == (1433, 364, (1, 8, 8))
    x = data.normalize(torch.cat((data.train.x, data.test.x)), torch.float64)
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3
    assert np.ptp(np.bincount(data.test.y) / np.bincount(torch.cat((data.train.y, data.test.y)))) < 0.01
    small, smaller = sources.digits(subset=50, augment=True), sources.digits(subset=20, augment=Flip(1.0))
    assert torch.equal(small.train.x[:20], smaller.train.x) and len(small.test) == 364
    assert isinstance(small.augment, Compose) and smaller.augment == Flip(1.0)
    for bad in (0, 1434):
        with pytest.raises(DataError, match=f"data.subset={bad}.*1433"):
            sources.digits(subset=bad)


def test_synthetic_follows_the_paper():
    options = {
        "num_ids": 6,
        "samples_per_id": 500,
        "num_features": 60,
        "num_classes": 10,
        "test_fraction": 0.1,
    }
    data = sources.synthetic(alpha=1.0, beta=1.0, seed=0, **options)
    assert (len(data.train), len(data.test)) == (2700, 300)
    assert np.bincount(data.ids).tolist() == [450] * 6
    x = data.train.x[torch.from_numpy(data.ids) == 2]
    deviation = torch.arange(1, 61) ** -0.6
    assert torch.allclose(x.std(0), deviation.float(), rtol=0.15)
    assert torch.equal(sources.synthetic(alpha=1.0, beta=1.0, seed=0, **options).train.x, data.train.x)
    uneven = sources.synthetic(alpha=0, beta=0, seed=1, **options | {"samples_per_id": None})
    assert np.bincount(uneven.ids).min() >= 45
    with pytest.raises(DataError, match="num_ids=0"):
        sources.synthetic(alpha=1, beta=1, seed=0, **options | {"num_ids": 0})


def test_blobs_are_separated():
    options = {"num_samples": 2000, "num_test": 500, "num_features": 8, "num_classes": 3}
    data = sources.blobs(separation=12.0, seed=0, **options)
    means = torch.stack([data.train.x[data.train.y == k].mean(0) for k in range(3)])
    assert torch.allclose(means.norm(dim=1), torch.full((3,), 12.0), rtol=0.05)
    assert (torch.cdist(data.test.x, means).argmin(1) == data.test.y).float().mean() > 0.99


def test_tensors_are_used_as_they_are():
    x, y = torch.rand(4, 2), torch.tensor([0, 2, 1, 0])
    data = sources.tensors(x, y, (x[:1], y[:1]), ids=np.array([1, 1, 0, 0]))
    assert data.train.x is x and data.classes == ("0", "1", "2") and len(data.test) == 1
    assert sources.tensors(x, torch.rand(4)).num_classes == 0
    with pytest.raises(DataError, match=r"shapes \(4, 2\) and \(3,\)"):
        sources.tensors(x, y[:3])
    with pytest.raises(DataError, match="one id for each of the 4"):
        sources.tensors(x, y, ids=np.zeros(3, int))


def test_shakespeare_windows_by_hand(tmp_path):
    pq.write_table(
        pa.table({"play": ["P", "P", "P"], "speaker": ["A", "B", "A"], "text": ["abcd", "b", "cba"]}),
        tmp_path / "speeches.parquet",
    )
    data = sources.shakespeare(tmp_path, window=2, stride=2, min_chars=2, test_fraction=0.4)
    assert data.classes == ("\n", "a", "b", "c", "d") and data.group_names["role"] == ("P: A",)
    assert data.train.x.tolist() == [[1, 2], [3, 4]] and data.train.y.tolist() == [3, 0]  # of "abcd\n"
    assert data.test.x.tolist() == [[3, 2]] and data.test.y.tolist() == [1]
    with pytest.raises(DataError, match=r"lower data\.min_chars"):
        sources.shakespeare(tmp_path, window=2, stride=2, min_chars=99, test_fraction=0.4)
