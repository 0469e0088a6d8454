"""What multi-domain sources share: reading images that lie in domains and classes, folds, and the data set itself.

Such a data set has feature shift: the same classes in several domains, which are the natural client ids. Training and
test samples carry a group ``domain``; ``Dataset.group_names["domain"]`` names its values. The sources are in
``fedsim.data.multidomain``. Options shared with every image source (``augment``, ``subset``) are described in
``fedsim.data.images``; further:

* ``domains``: which domains to keep, in this order; ``None`` keeps all, in alphabetical order.
* ``size``: side in pixels that images are resized to.
* ``test_folds``: which of the folds 0 to 9 (stratified by domain and class) are the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.common import encode, image_options, samples, stratified_folds
from fedsim.data.dataset import Augment, Dataset, Normalize
from fedsim.data.decoding import decode
from fedsim.data.files import columns_of, hub_tables, image_table, read_images
from fedsim.errors import DataError

# Channel statistics of ImageNet, usual for PACS and Office, and those of FedBN's digits (Li et al. 2021).
IMAGENET = Normalize(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYMMETRIC = Normalize(scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm")
NOTES = (
    ".txt",
    ".csv",
    ".json",
    ".xml",
    ".md",
    ".html",
    ".db",
    ".ini",
)  # files beside images that are no samples
COLUMNS = "*.parquet with columns image, domain, label"
LAYOUT = f"<domain>/<class>/<image> folders, or {COLUMNS}"


def images_at(root: Path, size: int, pattern: str = "*.parquet") -> Arrays:
    """Arrays image, domain, label, and fold where it is there, of one Parquet file, those of a folder that match
    ``pattern``, or the image folders ``<domain>/<class>/``; text stays text."""
    files = [root] if root.is_file() else sorted(f for f in root.glob(pattern) if not _hidden(f, root))
    if not files:
        return _folders(root, size)
    fold = ["fold"] if "fold" in columns_of(files[0]) else []
    return read_images(files, "image", ["domain", "label", *fold], channels=3, size=size)


def hub_images(
    name: str,
    columns: Sequence[str],
    size: int,
    *,
    config: str | None = None,
    split: str = "train",
    need: str = LAYOUT,
) -> Arrays:
    """One split of a data set of the hub: an image column, then others; decoded once. ``need``: see ``hub_tables``."""
    table, version = hub_tables(name, {split: split}, need, config=config)[split]
    image, rest = columns[0], list(columns[1:])

    def build() -> Arrays:
        return image_table(table, image, rest, channels=3, size=size, source=name)

    return cached(f"{name.replace('/', '--')}-{split}-domains", (version, *columns, str(size)), build)


def folded(arrays: Arrays, test_folds: Sequence[int]) -> tuple[Arrays, Arrays]:
    """Training and test arrays by the column ``fold``, or by ten fixed folds stratified by domain and class."""
    if "fold" in arrays:
        return split_folds(arrays, arrays["fold"], test_folds)
    label = encode(arrays["label"])[0]
    strata = encode(arrays["domain"])[0] * (int(label.max()) + 1) + label
    return split_folds(arrays, stratified_folds(strata, 10), test_folds)


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
    if (test["label"].dtype.kind == "U") != (train["label"].dtype.kind == "U"):
        raise DataError(
            f"{source}: labels are text in one split and numbers in the other; write both in one way"
        )
    known = np.unique(np.concatenate((train["label"], test["label"])))
    numbered = known.dtype.kind != "U" and (named or (known == np.arange(len(known))).all())
    if numbered and named and (known[0] < 0 or known[-1] >= len(named)):
        raise DataError(
            f"{source}: label {known[0] if known[0] < 0 else known[-1]}, but there are {len(named)} classes, numbered "
            f"from 0: {', '.join(named[:5])}, ..."
        )

    def part(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rank = np.full(len(arrays["domain"]), -1, dtype=np.int64)
        for code, name in enumerate(kept):
            rank[arrays["domain"] == name] = code
        chosen = rank >= 0
        label = arrays["label"] if numbered else np.searchsorted(known, arrays["label"])
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
        classes=named if numbered and named else tuple(str(k) for k in known),
        normalize=normalize,
        ids=domain,
        groups={"train": {"domain": domain}, "test": {"domain": test_domain}},
        group_names={"domain": kept},
    )
    return image_options(dataset, augment=augment, subset=subset)


def _folders(root: Path, size: int) -> Arrays:
    """Arrays image, domain, label of ``root/<domain>/<class>/<image>``, in name order, through the cache.

    Hidden files and folders, and notes beside the images, are passed over; another file among images is refused.
    """
    there = sorted(f for f in root.glob("*/*/*") if f.is_file() and not _hidden(f, root))
    files = [f for f in there if f.suffix.lower() in SUFFIXES]
    held = {f.parent for f in files}
    other = [f for f in there if f.parent in held and f.suffix.lower() not in (*SUFFIXES, *NOTES)]
    if other:
        raise DataError(
            f"{other[0]}: is no image that can be read ({', '.join(SUFFIXES)}); convert or remove it"
        )
    if not files:
        raise DataError(f"{root} holds no images; expected {LAYOUT}")

    names = [str(f.relative_to(root)) for f in files]

    def build() -> Arrays:
        blobs = [f.read_bytes() for f in files]
        image = decode(blobs, channels=3, size=size, source=str(root), names=names)
        return {
            "image": image,
            "domain": np.array([f.parts[-3] for f in files]),
            "label": np.array([f.parts[-2] for f in files]),
        }

    arrays = cached(f"{root.name}-domains", (*names, *fingerprint(files), str(size)), build)
    classes = {str(d): set(arrays["label"][arrays["domain"] == d]) for d in np.unique(arrays["domain"])}
    if not set.intersection(*classes.values()):
        raise DataError(f"{root}: the domains {sorted(classes)} share no class; expected {LAYOUT}")
    if (arrays["label"].dtype.kind == "U") and all(str(c).isdigit() for c in np.unique(arrays["label"])):
        return dict(arrays) | {"label": arrays["label"].astype(np.int64)}  # folders 0 to 9, as in Digits-5
    return arrays


def _hidden(file: Path, root: Path) -> bool:
    """Whether a file, or a folder below ``root`` that it lies in, is one that systems leave behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)
