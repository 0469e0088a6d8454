"""The embedded default data: scikit-learn's 8x8 digits."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedsim.data.common import image_options, samples, stratified_folds
from fedsim.data.dataset import Augment, Dataset, Normalize
from fedsim.data.images import DIGITS


def digits(
    *, standardise: bool = True, augment: bool | Augment = False, subset: int | None = None
) -> Dataset:
    """Scikit-learn's embedded 8x8 digits, 0 to 16 per pixel: 1433 training and 364 test images.

    One sample in five of each class is a test sample, by a fixed key. Pixels get mean 0 and variance 1, or lie in
    [0, 1] unless ``standardise``.
    """
    x, y = _embedded_digits()
    test = stratified_folds(y, 5) == 0
    dataset = Dataset(
        train=samples(x[~test], y[~test]),
        test=samples(x[test], y[test]),
        classes=DIGITS,
        normalize=Normalize(scale=1 / 16, mean=(0.3053,), std=(0.3760,))
        if standardise
        else Normalize(scale=1 / 16),
    )
    return image_options(dataset, augment=augment, subset=subset)


def _embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """The table inside the scikit-learn package, x (1797, 1, 8, 8) uint8 and y (1797,), without importing scikit-learn:
    that takes seconds, most of a short run's start."""
    package = find_spec("sklearn")
    path = (
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if package and package.origin
        else None
    )
    if path is not None and path.is_file():
        with gzip.open(path, "rt") as table:
            rows = np.loadtxt(table, delimiter=",", dtype=np.int64)
        x, y = rows[:, :-1], rows[:, -1]
    else:  # another layout of the package
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 1, 8, 8).astype(np.uint8), y.astype(np.int64)
