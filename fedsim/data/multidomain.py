"""Data sets with several domains (feature shift), from wherever they lie: Parquet files, a folder per domain and class,
or the hub. Options are described in ``fedsim.data.domains``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.cache import Arrays
from fedsim.data.common import stratified_folds
from fedsim.data.dataset import Augment, Dataset, Normalize
from fedsim.data.digits import digits
from fedsim.data.domains import (
    COLUMNS,
    IMAGENET,
    LAYOUT,
    SYMMETRIC,
    as_dataset,
    folded,
    hub_images,
    images_at,
)
from fedsim.data.files import PathLike, existing
from fedsim.data.images import DIGITS
from fedsim.errors import DataError

SPLITS = f"train-{COLUMNS} (test- likewise), or folders train and test, each of <domain>/<class>/<image>"
DIGITS5 = {  # domain: name on the hub and its configuration; columns image and label
    "mnist": ("ylecun/mnist", None),
    "mnist_m": ("Mike0307/MNIST-M", None),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    "usps": ("flwrlabs/usps", None),
}
PUBLISHED = {  # option of data: its domains
    "pacs": {"art_painting", "cartoon", "photo", "sketch"},
    "office_caltech10": {"amazon", "caltech10", "dslr", "webcam"},
    "office_home": {"Art", "Clipart", "Product", "Real World"},
    "digits6": {"fonts", "mnist", "mnist_m", "scene", "semeion", "usps"},
}


def domain_images(
    path: PathLike | None,
    *,
    hub: str | None = None,
    domains: Sequence[str] | None = None,
    size: int = 64,
    test_folds: Sequence[int] = (0, 1, 2),
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Images in several domains with the same classes, x ``(N, 3, size, size)``: PACS, Office-Home, one's own.

    Args:
        path: a folder of folders ``<domain>/<class>/``, or of Parquet files with columns image, domain, label.
        hub: name of a data set on the hub with those columns (all in its split ``train``), where ``path`` is null.
        domains, size, test_folds, augment, subset: as for every multi-domain source. Folds are stratified by
            domain and class, by a fixed key, unless Parquet files have a column ``fold``.
    """
    if path is None and hub is None:
        raise DataError(f"data.path=null: type data.path=<folder>, holding {LAYOUT}, or data.hub=<name>")
    if path is not None:
        root = existing(path, LAYOUT)
        arrays, source = images_at(root, size), str(root)
        check_set(str(hub).rpartition("/")[2].replace("-", "_"), arrays, source)
    else:
        arrays, source = hub_images(str(hub), ("image", "domain", "label"), size), str(hub)
    train, test = folded(arrays, test_folds)
    return as_dataset(train, test, source, (), IMAGENET, domains, augment, subset)


def check_set(wanted: str, arrays: Arrays, source: str) -> None:
    """Refuse another published data set of the same form, known by its domains.

    Raises:
        DataError: naming both.
    """
    found = set(map(str, np.unique(arrays["domain"])))
    if found & PUBLISHED.get(wanted, found):
        return
    for name, domains in PUBLISHED.items():
        if found <= domains:
            raise DataError(
                f"{source} has the domains {', '.join(sorted(found))}: it is {name}, not {wanted}; type data={name}, "
                "or another data.path"
            )


def digits5(
    path: PathLike | None,
    *,
    domains: Sequence[str] | None = None,
    size: int = 32,
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Digits-5: mnist, mnist_m, svhn, syn, usps; x ``(N, 3, size, size)``, each with its own test set.

    ``path`` is a folder ``{train,test}/<domain>/<class>/``, or of Parquet files as for ``digits6``; without one, the
    four domains that the hub has under known names are fetched (``DIGITS5``; syn is not among them).
    """
    if path is not None:
        return digits6(path, domains=domains, size=size, augment=augment, subset=subset)
    for name in domains or DIGITS5:
        if name not in DIGITS5:
            raise DataError(
                f"data.domains: {name!r} has no known name on the hub; type data.path=<folder>, holding {SPLITS}"
            )
    train, test = (
        _joined([_hub_digits(name, size, split) for name in domains or DIGITS5])
        for split in ("train", "test")
    )
    return as_dataset(train, test, "the hub", DIGITS, SYMMETRIC, domains, augment, subset)


def digits6(
    path: PathLike | None,
    *,
    domains: Sequence[str] | None = None,
    size: int = 32,
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Digits from six domains (fonts, mnist, mnist_m, scene, semeion, usps), x ``(N, 3, size, size)``.

    A folder with ``train-*.parquet`` and ``test-*.parquet``, or of folders ``{train,test}/<domain>/<class>/``.
    """
    root = _given(path, "digits6", SPLITS)
    train, test = (_split(root, split, size) for split in ("train", "test"))
    check_set("digits6", train, str(root))
    return as_dataset(train, test, str(root), DIGITS, SYMMETRIC, domains, augment, subset)


def office_caltech10(
    path: PathLike | None,
    *,
    what: str = "images",
    domains: Sequence[str] | None = None,
    size: int = 64,
    test_folds: Sequence[int] = (0,),
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Office-Caltech10 (Gong et al. 2012): amazon, caltech10, dslr, webcam; 10 classes.

    ``what`` is ``images`` (x ``(N, 3, size, size)`` uint8), ``surf`` (word counts ``(N, 800)``: rows scaled
    to sum 1, then columns standardised on the training samples, both float32, as in Gong et al.) or
    ``googlenet`` (``(N, 1024)`` float32 as stored; without caltech10). ``size`` and ``augment`` apply to
    images only, which may lie in folders ``<domain>/<class>/`` as published. No copy on the hub is known.
    """
    need = "images*.parquet (columns image, domain, label), or folders <domain>/<class>/, and features.npz"
    root = _given(path, "office_caltech10", need)
    if what == "images":
        arrays = images_at(root, size, "images*.parquet")
        check_set("office_caltech10", arrays, str(root))
        train, test = folded(arrays, test_folds)
        return as_dataset(train, test, str(root), (), IMAGENET, domains, augment, subset)
    if what not in ("surf", "googlenet"):
        raise DataError(f"data.what={what!r}: office_caltech10 has 'images', 'surf' and 'googlenet'")
    if augment is not False:
        raise DataError(f"data.augment={augment!r}: {what} features are no images; type data.augment=false")
    file = existing(root / "features.npz", need)
    try:
        with np.load(file, allow_pickle=False) as stored:
            x, y, domain = (stored[what + end] for end in ("", "_label", "_domain"))
            classes = tuple(str(name) for name in stored["classes"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{file}: expected arrays {what}, {what}_label, {what}_domain, classes ({error})"
        ) from error
    arrays = {"image": x.astype(np.float32), "label": y.astype(np.int64), "domain": domain.astype(str)}
    train, test = folded(arrays, test_folds)
    if what == "surf":
        _standardise(train, test)
    return as_dataset(train, test, str(root), classes, None, domains, False, subset)


def distorted_digits(*, domains: Sequence[str] | None = None) -> Dataset:
    """Scikit-learn's 8x8 digits as seen by four cameras, x ``(N, 1, 8, 8)`` uint8 from 0 to 16; nothing to fetch.

    ``plain``; ``inverted``: 16 - x; ``turned``: by 90 degrees; ``blurred``: the mean over 3x3 pixels. Every digit
    appears in one domain only: the samples of each class are dealt out to the domains by a fixed key.
    """
    whole = digits()
    assert whole.test is not None
    views = {"plain": _plain, "inverted": _inverted, "turned": _turned, "blurred": _blurred}
    names = np.array(sorted(views))

    def part(data: Any) -> Arrays:
        x, y = data.x.numpy(), data.y.numpy()
        code = stratified_folds(y, len(names))
        image = np.stack([views[str(names[c])](row) for row, c in zip(x, code, strict=True)])
        return {"image": image.astype(np.uint8), "label": y, "domain": names[code]}

    scale = Normalize(scale=1 / 16)
    return as_dataset(part(whole.train), part(whole.test), "the digits", DIGITS, scale, domains, False, None)


def _given(path: PathLike | None, name: str, need: str) -> Path:
    if path is None:
        raise DataError(f"{name} is read from files only: type data.path=<folder>, holding {need}")
    return existing(path, need)


def _split(root: Path, split: str, size: int) -> Arrays:
    """Training or test images of a folder in one of the two layouts ``SPLITS``."""
    pattern = f"{split}-*.parquet"
    return images_at(root if any(root.glob(pattern)) else existing(root / split, SPLITS), size, pattern)


def _hub_digits(domain: str, size: int, split: str) -> Arrays:
    hub, config = DIGITS5[domain]
    columns = hub_images(hub, ("image", "label"), size, config=config, split=split, need=SPLITS)
    label = columns["label"]
    return {"image": columns["image"], "label": label, "domain": np.full(len(label), domain)}


def _joined(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _standardise(train: Arrays, test: Arrays) -> None:
    for part in (train, test):
        part["image"] /= np.maximum(part["image"].sum(axis=1, keepdims=True), 1)
    mean, std = train["image"].mean(axis=0), train["image"].std(axis=0)
    for part in (train, test):
        part["image"] = (part["image"] - mean) / np.where(std > 0, std, 1)


def _plain(x: np.ndarray) -> np.ndarray:
    return x


def _inverted(x: np.ndarray) -> np.ndarray:
    return 16 - x


def _turned(x: np.ndarray) -> np.ndarray:
    return np.rot90(x, axes=(1, 2))


def _blurred(x: np.ndarray) -> np.ndarray:
    wide = np.pad(x.astype(float), ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = x.shape[1:]
    near = [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    mean: np.ndarray = np.mean(near, axis=0)
    out: np.ndarray = np.rint(mean)
    return out
