"""Published image data sets: CIFAR, MNIST, Fashion-MNIST.

Images stay uint8 ``(N, C, H, W)`` and carry a ``Normalize`` with the published channel statistics. All
functions raise ``DataError`` for missing or damaged files, and take two options:

* ``augment``: ``True`` mirrors and pad-crops training batches; or a transform of one's own.
* ``subset``: only that many training samples, the first after a fixed shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedsim.data.cache import Arrays, cached
from fedsim.data.common import image_options, samples
from fedsim.data.dataset import Augment, Dataset, Normalize
from fedsim.data.files import (
    PathLike,
    column_array,
    columns_of,
    existing,
    hub_tables,
    image_table,
    read_idx,
    read_images,
    read_table,
    split_files,
)
from fedsim.errors import DataError

DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
PARQUET = "train-*.parquet and test-*.parquet"
BEGINNINGS = {  # the first training labels of sets whose files have the same names
    "ylecun/mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4),
    "zalando-datasets/fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5),
}
COLUMNS = {
    ("img", "fine_label"): "cifar100",
    ("img", "label"): "cifar10",
    ("image", "label"): "mnist or fashion_mnist",
}
IDX = ", ".join(f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1")) + (
    " and the same of t10k"
)


@dataclass(frozen=True)
class _Published:
    """A data set of the hub: where it lies, its columns, how its pixels are scaled."""

    hub: str
    image: str
    label: str
    channels: int
    normalize: Normalize
    expected: str


def _pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalize:
    return Normalize(scale=1 / 255, mean=mean, std=std)


_CIFAR10 = _Published(
    *("uoft-cs/cifar10", "img", "label", 3),
    normalize=_pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    expected=f"{PARQUET} with columns img, label",
)
_MNIST = _Published(
    "ylecun/mnist", "image", "label", 1, normalize=_pixels((0.1307,), (0.3081,)), expected=IDX
)
_FASHION = _Published(
    *("zalando-datasets/fashion_mnist", "image", "label", 1),
    normalize=_pixels((0.2860,), (0.3530,)),
    expected=IDX,
)


def cifar10(
    path: PathLike | None = None, *, augment: bool | Augment = False, subset: int | None = None
) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009), x ``(N, 3, 32, 32)``; one Parquet file as ``path`` means no test set."""
    dataset = _published(_CIFAR10, path, CIFAR10)
    return image_options(dataset, augment=augment, subset=subset)


def cifar100(
    path: PathLike | None = None,
    *,
    labels: str = "fine",
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009), x ``(N, 3, 32, 32)``; ``labels``: ``fine`` (100) or ``coarse`` (20)."""
    if labels not in ("fine", "coarse"):
        raise DataError(f"data.labels={labels!r}: cifar100 has labels 'fine' (100 classes) and 'coarse' (20)")
    spec = _Published(
        *("uoft-cs/cifar100", "img", f"{labels}_label", 3),
        normalize=_pixels((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        expected=f"{PARQUET} with columns img, {labels}_label",
    )
    names = tuple(str(k) for k in range(100 if labels == "fine" else 20))
    return image_options(_published(spec, path, names), augment=augment, subset=subset)


def fashion_mnist(
    path: PathLike | None = None, *, augment: bool | Augment = False, subset: int | None = None
) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017), x ``(N, 1, 28, 28)``; from IDX files, Parquet, or the hub."""
    return image_options(_published(_FASHION, path, FASHION), augment=augment, subset=subset)


def mnist(
    path: PathLike | None = None,
    *,
    ids: str = "none",
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """MNIST (LeCun et al. 1998), x ``(N, 1, 28, 28)``; from the four IDX files, Parquet, or the hub.

    ``ids="writers"`` makes the 539 training writers natural ids; it needs ``writers.parquet`` beside the IDX
    files (columns split, index, writer_id, after QMNIST, Yadav and Bottou 2019).
    """
    if ids not in ("none", "writers"):
        raise DataError(f"data.ids={ids!r}: mnist has ids 'none' and 'writers'")
    dataset = _published(_MNIST, path, DIGITS)
    if ids == "writers":
        dataset = _with_writers(dataset, path)
    return image_options(dataset, augment=augment, subset=subset)


def _published(spec: _Published, path: PathLike | None, classes: Sequence[str]) -> Dataset:
    """Load a published image data set from IDX files, Parquet or the hub; every label must be a class."""
    if path is None:
        arrays, source = _from_hub(spec), spec.hub
    else:
        root, source = existing(path, spec.expected), str(path)
        if (root / "train-images-idx3-ubyte.gz").exists():
            if spec.expected != IDX:
                raise DataError(
                    f"{root} holds IDX files, as MNIST and Fashion-MNIST do; expected {spec.expected}. Type data=mnist "
                    "or data=fashion_mnist, or another data.path"
                )
            arrays = _from_idx(root, spec)
        else:
            files = split_files(root, spec.expected)
            _check_columns(spec, files["train"][0])
            arrays = {
                split: read_images(part, spec.image, [spec.label], channels=spec.channels)
                for split, part in files.items()
            }
    names = tuple(str(name) for name in arrays["train"].get(f"{spec.label}.names", classes))
    _check_set(spec, arrays["train"][spec.label], names, classes, source)
    for part in arrays.values():
        found = part[spec.label]
        if found.dtype.kind != "i" or found.min() < 0 or found.max() >= len(names):
            raise DataError(f"{source}: labels in '{spec.label}' must be 0 to {len(names) - 1}")
    test = arrays.get("test")
    return Dataset(
        train=samples(arrays["train"]["image"], arrays["train"][spec.label]),
        test=None if test is None else samples(test["image"], test[spec.label]),
        classes=names,
        normalize=spec.normalize,
    )


def _check_columns(spec: _Published, file: Path) -> None:
    """Refuse a table that lacks columns of the set, and has those of another one."""
    there = set(columns_of(file))
    other = next((name for needed, name in COLUMNS.items() if there.issuperset(needed)), None)
    if other is not None and not there.issuperset({spec.image, spec.label}):
        raise DataError(
            f"{file} has the columns {', '.join(sorted(there))}, as {other} has; expected {spec.image}, {spec.label} "
            f"of {spec.hub}. Type data={other}, or another data.path"
        )


def _check_set(
    spec: _Published, labels: np.ndarray, names: Sequence[str], classes: Sequence[str], source: str
) -> None:
    """Refuse another data set of the same form: by the names of its classes, or the labels that it begins with."""
    for hub, start in BEGINNINGS.items():
        if hub != spec.hub and len(labels) == 60_000 and labels[: len(start)].tolist() == list(start):
            raise DataError(
                f"{source} is {hub}, not {spec.hub}; type data={hub.split('/')[1]}, or another data.path"
            )
    words = any(not name.isdigit() for name in (*names, *classes))
    if spec.label == "label" and words and [n.lower() for n in names] != [c.lower() for c in classes]:
        odd = sorted({n.lower() for n in names} ^ {c.lower() for c in classes})
        if len(names) != len(classes) or len(odd) == 2 * len(names):
            raise DataError(
                f"{source} has the classes {', '.join(names[:5])}, ...: not those of {spec.hub} "
                f"({', '.join(classes[:5])}, ...); type another data=... or data.path"
            )


def _from_hub(spec: _Published) -> dict[str, Arrays]:
    tables = hub_tables(spec.hub, {"train": "train", "test": "test"}, spec.expected)

    def decoded(split: str) -> Arrays:
        table, version = tables[split]
        return cached(
            f"{spec.hub.replace('/', '--')}-{split}",
            (version, spec.image, spec.label),
            lambda: image_table(
                table, spec.image, [spec.label], channels=spec.channels, size=None, source=spec.hub
            ),
        )

    return {split: decoded(split) for split in tables}


def _from_idx(root: Path, spec: _Published) -> dict[str, Arrays]:
    def part(stem: str) -> Arrays:
        files = [root / f"{stem}-images-idx3-ubyte.gz", root / f"{stem}-labels-idx1-ubyte.gz"]
        x, y = (read_idx(existing(file, spec.expected), 3 - 2 * k) for k, file in enumerate(files))
        if len(x) != len(y):
            raise DataError(f"{files[0]} has {len(x)} images but {files[1]} has {len(y)} labels")
        return {spec.image: x[:, None], "image": x[:, None], spec.label: y.astype(np.int64)}

    return {"train": part("train"), "test": part("t10k")}


def _with_writers(dataset: Dataset, path: PathLike | None) -> Dataset:
    need = "writers.parquet (columns split, index, writer_id) beside the IDX files"
    if path is None:
        raise DataError(f"data.ids=writers needs data.path=<folder>, holding {need}")
    file = existing(Path(path) / "writers.parquet", need)
    table = read_table(file, ["split", "index", "writer_id"])
    split, index, writer = (column_array(table, name, str(file)) for name in ("split", "index", "writer_id"))

    def ids(name: str, count: int) -> np.ndarray:
        chosen = split == name
        if not np.array_equal(np.sort(index[chosen]), np.arange(count)):
            raise DataError(f"{file}: split '{name}' must name each of the {count} images once")
        out = np.empty(count, dtype=np.int64)
        out[index[chosen]] = writer[chosen]
        return out

    train = ids("train", len(dataset.train))
    test = dataset.test
    groups = {"train": {"writer": train}} | (
        {} if test is None else {"test": {"writer": ids("test", len(test))}}
    )
    return replace(dataset, ids=train, groups=groups)
