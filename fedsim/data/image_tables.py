"""Images of one's own in Parquet files: any columns, classes and client ids as they are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.agreed import Contract
from fedsim.data.cache import Arrays
from fedsim.data.columns import ContractError
from fedsim.data.common import encode, image_options, samples
from fedsim.data.dataset import Augment, Dataset, Normalize, Samples
from fedsim.data.files import PathLike, existing, read_images, read_table, split_files
from fedsim.data.image_folders import check_images
from fedsim.errors import DataError


def parquet(
    path: PathLike | None,
    *,
    image: str,
    label: str,
    ids: str | None = None,
    size: int | None = None,
    augment: bool | Augment = False,
    subset: int | None = None,
    contract: Mapping[str, Any] | None = None,
) -> Dataset:
    """RGB images ``(N, 3, H, W)`` of any local Parquet file, or folder of them.

    Args:
        path: the file (all of it is training data), or folder of train-*.parquet and maybe test-*.parquet.
        image: column of encoded images (bytes, or a struct with a field ``bytes``).
        label: column of class labels, integers or text; classes are its sorted distinct values, those of the test
            set included.
        ids: column of natural client ids, integers or text.
        size: side in pixels to resize to; needed when images differ in size.
        augment: as in ``fedsim.data.images``.
        subset: as in ``fedsim.data.images``.
        contract: what ``data.contract`` says; images of another mode or size are refused by count and row.

    Pixels are normalised by the training set's own channel mean and deviation.
    """
    need = f"a Parquet file, or a folder with train-*.parquet, with columns {image}, {label}"
    if path is None:
        raise DataError(f"parquet is read from files only: type data.path=<{need}>")
    columns, agreed = [label] if ids is None else [label, ids], Contract.of(contract) or Contract()
    splits = split_files(existing(path, need), need)
    if faults := [f for files in splits.values() for f in _check(files, image, agreed, size)]:
        raise ContractError("\n".join(faults))
    parts = {
        split: read_images(files, image, columns, channels=1 if agreed.mode == "L" else 3, size=size)
        for split, files in splits.items()
    }
    train = parts["train"]
    known = np.unique(np.concatenate([_like(arrays[label], train[label], path) for arrays in parts.values()]))
    _check_known(known, f"{path}: column '{label}'")
    named = train.get(f"{label}.names")
    if named is not None and (known[0] < 0 or known[-1] >= len(named)):
        raise DataError(
            f"{path}: labels in '{label}' must be 0 to {len(named) - 1}, the file names that many classes"
        )

    def part(arrays: Arrays) -> Samples:
        return samples(arrays["image"], np.searchsorted(known, arrays[label]).astype(np.int64))

    dataset = Dataset(
        train=part(train),
        test=part(parts["test"]) if "test" in parts else None,
        classes=tuple(str(k) for k in (known if named is None else named[known])),
        normalize=channel_statistics(train["image"]),
        ids=None if ids is None else encode(train[ids])[0],
    )
    return image_options(dataset, augment=augment, subset=subset)


def _check(files: Sequence[Path], image: str, agreed: Contract, size: int | None) -> list[str]:
    """What of the encoded images is not as agreed."""
    if not (agreed.mode or agreed.size):
        return []
    cells = [cell for file in files for cell in read_table(file, [image])[image].to_pylist()]
    return check_images([c.get("bytes") if isinstance(c, dict) else c for c in cells], agreed, size)


def _like(labels: np.ndarray, train: np.ndarray, path: PathLike) -> np.ndarray:
    """``labels``, refused if they are text and those of the training set are not, or the other way round."""
    if (labels.dtype.kind == "U") != (train.dtype.kind == "U"):
        raise DataError(
            f"{path}: labels are text in one split and numbers in the other; write both in one way"
        )
    return labels


def _check_known(known: np.ndarray, where: str) -> None:
    """Refuse what stands for no label among the ``known`` (K,), in ascending order: blanks, and numbers below 0 but for
    -1 beside +1 alone."""
    if known.dtype.kind == "U":
        if any(not str(name).strip() for name in known):
            raise DataError(f"{where} has empty labels; fill or drop those rows")
    elif known[0] < 0 and known.tolist() != [-1, 1]:
        raise DataError(
            f"{where} has the label {known[0]}; classes are numbered from 0 (or are -1 and +1). Drop rows without a "
            "label, or number the classes anew"
        )


def channel_statistics(x: np.ndarray) -> Normalize:
    """``Normalize`` with mean and deviation per channel of uint8 images ``(N, C, H, W)``, exact."""
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(x.shape[1]):
        share = np.bincount(x[:, channel].reshape(-1), minlength=256) / x[:, channel].size
        mean.append(float(share @ levels))
        std.append(max(float(share @ levels**2 - mean[-1] ** 2), 0.0) ** 0.5 or 1.0)
    return Normalize(scale=1 / 255, mean=tuple(mean), std=tuple(std))
