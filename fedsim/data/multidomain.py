"""Multi-domain images from wherever they lie: a folder per domain and class, Parquet files, or the hub.

Every source here returns training and test samples with a group ``domain`` (see ``fedsim.data.domains``, also for the
options ``domains``, ``size`` and ``test_folds``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.common import encode, stratified_folds
from fedsim.data.dataset import Augment, Dataset, Normalize, Samples
from fedsim.data.digits import digits
from fedsim.data.domains import IMAGENET, SYMMETRIC, as_dataset, split_folds
from fedsim.data.files import PathLike, decode, existing, hub_tables, image_table, read_images
from fedsim.data.images import DIGITS
from fedsim.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
LAYOUT = "<domain>/<class>/<image> folders, or *.parquet with columns image, domain, label"
DIGITS5 = {  # domain: name on the hub, its configuration, image and label columns
    "mnist": ("ylecun/mnist", None, "image", "label"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
    "usps": ("flwrlabs/usps", None, "image", "label"),
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
    """Images in several domains with the same classes, x ``(N, 3, size, size)``: Office-Home, DomainNet, one's own.

    Args:
        path: a folder of folders ``<domain>/<class>/``, or of Parquet files with columns image, domain, label.
        hub: name of a data set on the hub with those columns (all in its split ``train``), where ``path`` is null.
        domains, size, test_folds, augment, subset: as for every multi-domain source. Folds are stratified by
            domain and class, by a fixed key, unless Parquet files have a column ``fold``.
    """
    if path is not None:
        root = existing(path, LAYOUT)
        files = [root] if root.is_file() else sorted(root.glob("*.parquet"))
        arrays, source = (_parquet(files, size) if files else _folders(root, size)), str(root)
    elif hub is not None:
        arrays, source = _hub(hub, None, ("image", "domain", "label"), size), hub
    else:
        raise DataError(f"data.path=null: type data.path=<folder>, holding {LAYOUT}, or data.hub=<name>")
    if "fold" in arrays:
        fold = arrays["fold"]
    else:
        label = encode(arrays["label"])[0]
        fold = stratified_folds(encode(arrays["domain"])[0] * (int(label.max()) + 1) + label, 10)
    train, test = split_folds(arrays, fold, test_folds)
    return as_dataset(train, test, source, (), IMAGENET, domains, augment, subset)


def digits5(
    path: PathLike | None,
    *,
    domains: Sequence[str] | None = None,
    size: int = 32,
    augment: bool | Augment = False,
    subset: int | None = None,
) -> Dataset:
    """Digits-5: mnist, mnist_m, svhn, syn, usps; x ``(N, 3, size, size)``, each with its own test set.

    ``path`` is a folder ``{train,test}/<domain>/<class>/``; without one, the three domains that the hub has under
    known names are fetched (``DIGITS5``).
    """
    need = "folders train and test, each of <domain>/<class>/<image>"
    parts: dict[str, Arrays] = {}
    for split in ("train", "test"):
        if path is not None:
            parts[split] = _folders(existing(Path(path) / split, need), size)
            continue
        found: list[Arrays] = []
        for name in domains or DIGITS5:
            if name not in DIGITS5:
                raise DataError(
                    f"data.domains: {name!r} has no known name on the hub; type data.path=<folder>, holding {need}"
                )
            hub, config, image, label = DIGITS5[name]
            columns = _hub(hub, config, (image, label), size, split)
            found.append(
                {
                    "image": columns["image"],
                    "label": columns["label"],
                    "domain": np.full(len(columns["label"]), name),
                }
            )
        parts[split] = {k: np.concatenate([columns[k] for columns in found]) for k in found[0]}
    source = "the hub" if path is None else str(path)
    return as_dataset(parts["train"], parts["test"], source, DIGITS, SYMMETRIC, domains, augment, subset)


def distorted_digits(*, domains: Sequence[str] | None = None) -> Dataset:
    """Scikit-learn's 8x8 digits as seen by four cameras, x ``(N, 1, 8, 8)`` uint8 from 0 to 16; nothing to fetch.

    ``plain``; ``inverted``: 16 - x; ``turned``: by 90 degrees; ``blurred``: the mean over 3x3 pixels. Every digit
    appears in one domain only: the samples of each class are dealt out to the domains by a fixed key.
    """
    whole = digits()
    assert whole.test is not None
    views = {"plain": _plain, "inverted": _inverted, "turned": _turned, "blurred": _blurred}
    names = np.array(sorted(views))

    def part(data: Samples) -> Arrays:
        x, y = data.x.numpy(), data.y.numpy()
        code = stratified_folds(y, len(names))
        image = np.stack([views[str(names[c])](row) for row, c in zip(x, code, strict=True)])
        return {"image": image.astype(np.uint8), "label": y, "domain": names[code]}

    scale = Normalize(scale=1 / 16)
    return as_dataset(part(whole.train), part(whole.test), "the digits", DIGITS, scale, domains, False, None)


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


def _folders(root: Path, size: int) -> Arrays:
    """Arrays image, domain, label of ``root/<domain>/<class>/<image>``, in name order, through the cache."""
    files = sorted(f for f in root.glob("*/*/*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{root} holds no images; expected {LAYOUT}")

    def build() -> Arrays:
        image = decode([f.read_bytes() for f in files], channels=3, size=size, source=str(root))
        return {
            "image": image,
            "domain": np.array([f.parts[-3] for f in files]),
            "label": np.array([f.parts[-2] for f in files]),
        }

    names = [str(f.relative_to(root)) for f in files]
    arrays = cached(f"{root.name}-domains", (*names, *fingerprint(files), str(size)), build)
    classes = {str(d): set(arrays["label"][arrays["domain"] == d]) for d in np.unique(arrays["domain"])}
    if not set.intersection(*classes.values()):
        raise DataError(f"{root}: the domains {sorted(classes)} share no class; expected {LAYOUT}")
    if (arrays["label"].dtype.kind == "U") and all(str(c).isdigit() for c in np.unique(arrays["label"])):
        return dict(arrays) | {"label": arrays["label"].astype(np.int64)}  # folders 0 to 9, as in Digits-5
    return arrays


def _parquet(files: Sequence[Path], size: int) -> Arrays:
    import pyarrow.parquet as pq

    columns = ["domain", "label"] + (["fold"] if "fold" in pq.read_schema(files[0]).names else [])
    return read_images(files, "image", columns, channels=3, size=size)


def _hub(name: str, config: str | None, columns: Sequence[str], size: int, split: str = "train") -> Arrays:
    """One split of a data set of the hub: an image column, then others; decoded once."""
    table, version = hub_tables(name, {split: split}, LAYOUT, config=config)[split]
    key = (version, *columns, str(size))
    image, rest = columns[0], list(columns[1:])

    def build() -> Arrays:
        return image_table(table, image, rest, channels=3, size=size, source=name)

    return cached(f"{name.replace('/', '--')}-{split}-domains", key, build)
