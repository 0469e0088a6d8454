"""What several sources share: fixed splits, class names, and the options every image source understands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim.data.augment import flip_and_crop
from fedsim.data.dataset import Augment, Dataset, Samples
from fedsim.data.views import named
from fedsim.errors import DataError

SPLIT_SEED = 20240229  # of every split that fedsim itself makes: part of the data sets, so never changed


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the memory of ``array`` (copied first if that is read-only)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def samples(x: np.ndarray, y: np.ndarray) -> Samples:
    """``Samples`` over the memory of two arrays."""
    return Samples(to_tensor(x), to_tensor(y))


def stratified_folds(strata: np.ndarray, folds: int) -> np.ndarray:
    """Fold 0..folds-1 of each sample ``(N,)``: within each stratum folds differ in size by at most one.

    Keyed by ``SPLIT_SEED`` alone, so a data set is split the same way everywhere.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
    out = np.empty(len(strata), dtype=np.int64)
    out[order] = (np.arange(len(strata)) - np.repeat(starts, counts)) % folds
    return out


def encode(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Integers or text ``(N,)`` as codes 0..K-1 (int64) in sorted order, and what each code stands for."""
    names, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64).reshape(values.shape), tuple(str(name) for name in names)


def image_options(dataset: Dataset, *, augment: bool | str | Augment, subset: int | None) -> Dataset:
    """Apply the options that every image source has.

    Args:
        dataset: images ``(N, C, H, W)``.
        augment: ``True`` for mirroring and pad-crop, the name of a view (``fedsim.data.views``), or a transform of
            one's own (see ``fedsim.data.augment``).
        subset: keep this many training samples, the first after a fixed shuffle; ``None`` keeps all in order.
    """
    if augment is True:
        dataset = replace(dataset, augment=flip_and_crop())
    elif isinstance(augment, str):
        scale = 1 / dataset.normalize.scale if dataset.normalize is not None else None
        stored = getattr(dataset.train, "x", None)
        bytes_high = scale if isinstance(stored, Tensor) and stored.dtype == torch.uint8 else None
        dataset = replace(dataset, augment=named(augment, "data.augment", high=bytes_high))
    elif augment is not False:
        if not callable(augment):
            raise DataError(
                f"data.augment={augment}: give true, false, the name of a view (weak, strong, ...), or a _target_ "
                "such as fedsim.data.warps.CatMap"
            )
        dataset = replace(dataset, augment=augment)
    return dataset if subset is None else take(dataset, subset)


def take(dataset: Dataset, count: int) -> Dataset:
    """The first ``count`` training samples after a fixed shuffle; the test set stays whole."""
    total = len(dataset.train)
    if not 0 < count <= total:
        raise DataError(
            f"data.subset={count}: this data set has {total} training samples; give 1 to {total} or null"
        )
    return select(dataset, np.random.default_rng(SPLIT_SEED).permutation(total)[:count])


def select(dataset: Dataset, index: np.ndarray) -> Dataset:
    """The training samples ``index`` (n,), in that order, with their ids and groups; the test set stays whole."""
    chosen = torch.from_numpy(index)
    groups = dict(dataset.groups)
    if "train" in groups:
        groups["train"] = {name: column[index] for name, column in groups["train"].items()}
    return replace(
        dataset,
        train=Samples(*dataset.train.take(chosen)),
        ids=None if dataset.ids is None else dataset.ids[index],
        groups=groups,
    )
