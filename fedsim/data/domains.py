"""Data sets with feature shift: the same classes in several domains, which are the natural client ids.

Training and test samples carry a group ``domain``; ``Dataset.group_names["domain"]`` names its values.
Options shared with every image source (``augment``, ``subset``) are described in ``fedsim.data.images``;
further:

* ``domains``: which domains to keep, in this order; ``None`` keeps all, in alphabetical order.
* ``size``: side in pixels that images are resized to.
* ``test_folds``: which of the folds 0 to 9 (stratified by domain and class) are the test set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.data.cache import Arrays
from fedsim.data.common import encode, image_options, samples, stratified_folds
from fedsim.data.dataset import Augment, Dataset, Normalize
from fedsim.data.files import PathLike, existing, parquet_files, read_images
from fedsim.data.images import DIGITS, PARQUET
from fedsim.errors import DataError

# Channel statistics of ImageNet, usual for PACS and Office, and those of FedBN's digits (Li et al. 2021).
IMAGENET = Normalize(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYMMETRIC = Normalize(scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def digits6(
    path: PathLike | None,
    *,
    domains: Sequence[str] | None = None,
    size: int = 32,
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Digits from six domains (fonts, mnist, mnist_m, scene, semeion, usps), x ``(N, 3, size, size)``."""
    need = f"{PARQUET} with columns image, domain, label"
    root = existing(_given(path, "digits6", need), need)
    train, test = (
        read_images(
            parquet_files(root, f"{split}-*.parquet", need),
            "image",
            ["domain", "label"],
            channels=3,
            size=size,
        )
        for split in ("train", "test")
    )
    return as_dataset(train, test, str(root), DIGITS, SYMMETRIC, domains, augment, subset)


def pacs(
    path: PathLike | None,
    *,
    domains: Sequence[str] | None = None,
    size: int = 64,
    test_folds: Sequence[int] = (0,),
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """PACS (Li et al. 2017): art_painting, cartoon, photo, sketch; 7 classes, x ``(N, 3, size, size)``.

    From Parquet files; on the hub it is ``data=domain_images data.hub=flwrlabs/pacs``.
    """
    need = "pacs*.parquet with columns image, domain, label, fold"
    root = existing(_given(path, "pacs", need), need)
    train, test = _folded_images(root, "pacs*.parquet", need, size, test_folds)
    return as_dataset(train, test, str(root), (), IMAGENET, domains, augment, subset)


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
    images only.
    """
    need = "images*.parquet (columns image, domain, label, fold) and features.npz (surf, googlenet)"
    root = existing(_given(path, "office_caltech10", need), need)
    if what == "images":
        train, test = _folded_images(root, "images*.parquet", need, size, test_folds)
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
    strata = encode(arrays["domain"])[0] * len(classes) + arrays["label"]
    train, test = split_folds(arrays, stratified_folds(strata, 10), test_folds)
    if what == "surf":
        _standardise(train, test)
    return as_dataset(train, test, str(root), classes, None, domains, False, subset)


def _given(path: PathLike | None, name: str, need: str) -> PathLike:
    if path is None:
        raise DataError(f"{name} is read from files only: type data.path=<folder>, holding {need}")
    return path


def _folded_images(
    root: PathLike, pattern: str, need: str, size: int, test_folds: Sequence[int]
) -> tuple[Arrays, Arrays]:
    root = existing(root, need)
    files = [root] if root.is_file() else parquet_files(root, pattern, need)
    arrays = read_images(files, "image", ["domain", "label", "fold"], channels=3, size=size)
    return split_folds(arrays, arrays["fold"], test_folds)


def split_folds(arrays: Arrays, fold: np.ndarray, test_folds: Sequence[int]) -> tuple[Arrays, Arrays]:
    """Training and test arrays by the ``fold (N,)`` of each sample."""
    chosen = sorted(set(test_folds))
    if not chosen or chosen[0] < 0 or chosen[-1] > 9 or len(chosen) == 10:
        raise DataError(f"data.test_folds={list(test_folds)}: give 1 to 9 of the folds 0 to 9")
    test = np.isin(fold, chosen)
    sized = {name: value for name, value in arrays.items() if not name.endswith(".names")}
    fixed = {name: value for name, value in arrays.items() if name not in sized}
    return (
        {name: value[~test] for name, value in sized.items()} | fixed,
        {name: value[test] for name, value in sized.items()} | fixed,
    )


def _standardise(train: Arrays, test: Arrays) -> None:
    for part in (train, test):
        part["image"] /= np.maximum(part["image"].sum(axis=1, keepdims=True), 1)
    mean, std = train["image"].mean(axis=0), train["image"].std(axis=0)
    for part in (train, test):
        part["image"] = (part["image"] - mean) / np.where(std > 0, std, 1)


def as_dataset(
    train: Arrays,
    test: Arrays,
    source: str,
    classes: tuple[str, ...],
    normalize: Normalize | None,
    domains: Sequence[str] | None,
    augment: bool | Augment,
    subset: int | None,
) -> Dataset:
    """Join the two splits, keeping ``domains``; text labels and domains become codes."""
    present = tuple(str(name) for name in np.unique(train["domain"]))
    kept = present if domains is None else tuple(domains)
    unknown = sorted(set(kept) - set(present))
    if unknown or not kept or len(set(kept)) < len(kept):
        raise DataError(
            f"data.domains={list(kept)}: {source} has the domains {list(present)}, each to be named once"
        )
    named = tuple(str(name) for name in train.get("label.names", classes))
    known = np.unique(train["label"])
    text = known.dtype.kind == "U"

    def part(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rank = np.full(len(arrays["domain"]), -1, dtype=np.int64)
        for code, name in enumerate(kept):
            rank[arrays["domain"] == name] = code
        chosen = rank >= 0
        label = np.searchsorted(known, arrays["label"]) if text else arrays["label"]
        whole = bool(chosen.all())  # then the memory map is used as it is
        return (
            arrays["image"] if whole else arrays["image"][chosen],
            label[chosen].astype(np.int64),
            rank[chosen],
        )

    (x, y, domain), (test_x, test_y, test_domain) = part(train), part(test)
    dataset = Dataset(
        train=samples(x, y),
        test=samples(test_x, test_y),
        classes=named or tuple(str(k) for k in known),
        normalize=normalize,
        ids=domain,
        groups={"train": {"domain": domain}, "test": {"domain": test_domain}},
        group_names={"domain": kept},
    )
    return image_options(dataset, augment=augment, subset=subset)
