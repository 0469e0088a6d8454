"""Data sets of plain vectors: hospitals' patients, generated samples, tensors of one's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.config.textfile import read_text
from fedsim.data.arrays import array
from fedsim.data.common import encode, samples
from fedsim.data.containers import Part
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.files import PathLike, existing
from fedsim.data.labels import TargetRules, targets
from fedsim.errors import DataError

HEART_COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal"),
)
SPARSE_HEART_COLUMNS = ("slope", "ca", "thal")  # mostly missing outside Cleveland


def heart_disease(path: PathLike | None, *, missing: str = "median") -> Dataset:
    """UCI heart disease (Janosi et al. 1988): is a patient ill; natural ids are the four hospitals.

    Args:
        path: folder with ``heart_disease.csv``, or that file.
        missing: ``median`` keeps all 920 patients and 13 attributes (x ``(N, 13)``), fills gaps with the
            training median and takes a cholesterol of 0 as a gap; ``drop`` leaves out slope, ca, thal and
            then patients with gaps: 740 patients, x ``(N, 10)``, the cohort of FLamby's Fed-Heart-Disease (du
            Terrail et al. 2022).

    Attributes are float32, standardised by mean and deviation of all hospitals' training patients together; one that
    is constant there becomes 0 where it has that value.
    """
    need = "heart_disease.csv with columns hospital, split, target and the 13 attributes"
    if path is None:
        raise DataError(f"heart_disease is read from a file only: type data.path=<folder>, holding {need}")
    if missing not in ("median", "drop"):
        raise DataError(f"data.missing={missing!r}: heart_disease knows 'median' and 'drop'")
    root = existing(path, need)
    file = existing(root / "heart_disease.csv", need) if root.is_dir() else root
    names = [name for name in HEART_COLUMNS if missing == "median" or name not in SPARSE_HEART_COLUMNS]
    x, target, hospital, split = _heart_rows(file, names, need)
    if missing == "median":
        cholesterol = names.index("chol")
        x[x[:, cholesterol] == 0, cholesterol] = np.nan
    else:
        kept = ~np.isnan(x).any(axis=1)
        x, target, hospital, split = x[kept], target[kept], hospital[kept], split[kept]
    train = split == "train"
    if not train.any():
        raise DataError(f"{file}: no training patients are left; column 'split' must say train for some")
    if (gone := np.flatnonzero(np.isnan(x[train]).all(axis=0))).size:
        raise DataError(
            f"{file}: column '{names[gone[0]]}' is empty for all training patients; fill it, or type data.missing=drop "
            f"(leaves out {', '.join(SPARSE_HEART_COLUMNS)})"
        )
    x = _standardised(np.where(np.isnan(x), np.nanmedian(x[train], axis=0), x), train)
    codes, hospitals = encode(hospital)
    return Dataset(
        train=samples(x[train], target[train]),
        test=None if train.all() else samples(x[~train], target[~train]),
        classes=("healthy", "ill"),
        ids=codes[train],
        groups={"train": {"hospital": codes[train]}, "test": {"hospital": codes[~train]}},
        group_names={"hospital": hospitals},
        columns=tuple(names),
    )


def _heart_rows(
    file: Path, names: Sequence[str], need: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
        x = np.array([[float(row[name] or "nan") for name in names] for row in rows])
        target = np.array([int(row["target"]) for row in rows], dtype=np.int64)
        hospital, split = (np.array([row[name] for row in rows]) for name in ("hospital", "split"))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {error}); expected {need}"
        ) from error
    for name, column in zip(names, x.T, strict=True):
        if np.isinf(column).any():
            row = int(np.flatnonzero(np.isinf(column))[0])
            raise DataError(f"{file}, row {row + 1}: column '{name}' is infinite; leave the cell empty")
    if (odd := np.flatnonzero((target != 0) & (target != 1))).size:
        raise DataError(
            f"{file}, row {odd[0] + 1}: column 'target' is {target[odd[0]]}; it must be 0 (healthy) or 1 (ill). "
            "Of stages 0 to 4 all above 0 are ill: write target = (num > 0)"
        )
    if not len(rows) or not np.isin(split, ("train", "test")).all():
        raise DataError(f"{file}: column 'split' must say train or test in every row; expected {need}")
    return x, target, hospital, split


def _standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """``x`` (N, d) as float32 with mean 0 and deviation 1 over rows ``train``; constant columns are only shifted."""
    part = x[train]
    constant = part.min(axis=0) == part.max(axis=0)
    centre = np.where(constant, part[0], part.mean(axis=0))
    return np.asarray((x - centre) / np.where(constant, 1, part.std(axis=0)), dtype=np.float32)


def synthetic(
    *,
    alpha: float,
    beta: float,
    num_ids: int,
    samples_per_id: int | None,
    num_features: int,
    num_classes: int,
    test_fraction: float,
    seed: int,
) -> Dataset:
    """Synthetic(alpha, beta) of Li et al. 2020, "Federated optimization in heterogeneous networks", section
    5.1.

    Device k has its own model y = argmax(W_k x + b_k), with W_k, b_k ~ N(u_k, 1), u_k ~ N(0, alpha), and
    inputs x ~ N(v_k, diag(j^-1.2)), v_k ~ N(B_k, 1), B_k ~ N(0, beta). As in the authors' code alpha and beta
    are standard deviations. Natural ids are the devices; (0, 0) still gives each device its own model and
    inputs.

    Args:
        alpha: how much models differ between devices.
        beta: how much inputs differ between devices.
        num_ids: number of devices (30 in the paper).
        samples_per_id: samples of each device; ``None``: lognormal(4, 2) + 50, cut to whole numbers, as
            published.
        num_features: length of x (60 in the paper), float32.
        num_classes: number of classes (10 in the paper).
        test_fraction: share of each device's samples in the test set, rounded down (0.1 in the paper).
        seed: of all draws; the data set is a constant, whatever the seed of the run.
    """
    _positive(
        num_ids=num_ids, samples_per_id=samples_per_id, num_features=num_features, num_classes=num_classes
    )
    if not 0 <= test_fraction < 1:
        raise DataError(f"data.test_fraction={test_fraction}: give 0 <= test_fraction < 1")
    rng = np.random.default_rng(seed)
    if samples_per_id is None:
        sizes = rng.lognormal(4, 2, num_ids).astype(np.int64) + 50
    else:
        sizes = np.full(num_ids, samples_per_id, dtype=np.int64)
    model_mean, input_mean = rng.normal(0, alpha, num_ids), rng.normal(0, beta, num_ids)
    centre = rng.normal(input_mean[:, None], 1, (num_ids, num_features)).astype(np.float32)
    deviation = (np.arange(1, num_features + 1) ** -0.6).astype(np.float32)
    ends = np.cumsum(sizes)
    x = rng.standard_normal((int(ends[-1]), num_features), dtype=np.float32) * deviation
    y = np.empty(len(x), dtype=np.int64)
    test = np.zeros(len(x), dtype=bool)
    for k, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        weight = rng.standard_normal((num_classes, num_features), dtype=np.float32) + np.float32(
            model_mean[k]
        )
        bias = rng.standard_normal(num_classes, dtype=np.float32) + np.float32(model_mean[k])
        x[start:end] += centre[k]
        y[start:end] = (x[start:end] @ weight.T + bias).argmax(axis=1)
        test[end - int(sizes[k] * test_fraction) : end] = True
    ids = np.repeat(np.arange(num_ids), sizes)
    return _generated(x, y, test, num_classes, ids)


def blobs(
    *, num_samples: int, num_test: int, num_features: int, num_classes: int, separation: float, seed: int
) -> Dataset:
    """Gaussian blobs: class k is N(separation * m_k, I) with m_k a random unit vector; x float32 ``(N,
    num_features)``.

    Made in one vectorised draw (a million samples of 8 features: well under a second), for scaling tests with
    as many clients as samples. Classes are drawn uniformly; ``seed`` alone decides the data.
    """
    _positive(num_samples=num_samples, num_features=num_features, num_classes=num_classes)
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((num_classes, num_features), dtype=np.float32)
    mean *= np.float32(separation) / np.linalg.norm(mean, axis=1, keepdims=True)
    total = num_samples + num_test
    y = rng.integers(num_classes, size=total)
    x = rng.standard_normal((total, num_features), dtype=np.float32)
    x += mean[y]
    return _generated(x, y, np.arange(total) >= num_samples, num_classes, None)


def tensors(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    test: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    *,
    classes: Sequence[str] | None = None,
    ids: np.ndarray | None = None,
) -> Dataset:
    """Samples already in memory, used as they are (no copy, no normalising). What a run makes of targets that are not
    0 to C-1 is said in ``fedsim.data.labels``.

    Args:
        x: inputs ``(N, ...)``.
        y: class labels ``(N,)``, integers or text, or targets of any shape ``(N, ...)``.
        test: inputs and targets of the test set.
        classes: names of the classes; ``None`` takes those of text and numbers 0 to max(y); other targets have none
            until a run reads them.
        ids: natural client ids ``(N,)``, integers.
    """
    pairs = [_pair("x, y", x, y)] + ([] if test is None else [_pair("test", *test)])
    whose, given = ["x, y", "test"][: len(pairs)], [pair.y for pair in pairs]
    ys, named = targets(whose, given, TargetRules(own_loss=True))
    if not isinstance(given[0], np.ndarray) and named and min(int(t.min()) for t in ys if len(t)):
        named = ()
    train, *rest = (Samples(torch.as_tensor(pair.x), t) for pair, t in zip(pairs, ys, strict=True))
    held_out = rest[0] if rest else None
    if ids is not None and np.shape(ids) != (len(train),):
        raise DataError(
            f"ids has shape {np.shape(ids)}; expected one id for each of the {len(train)} samples"
        )
    return Dataset(
        train=train,
        test=held_out,
        classes=tuple(classes or named),
        ids=None if ids is None else np.asarray(ids, dtype=np.int64),
    )


def _pair(name: str, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Part:
    inputs, found = array(name, x), array(name, y)
    if inputs.ndim < 2 or len(inputs) != len(found) or not len(inputs):
        raise DataError(
            f"{name}: shapes {tuple(inputs.shape)} and {tuple(found.shape)}; expected (N, ...) with a "
            "feature dimension and (N, ...) with the same N > 0"
        )
    if isinstance(inputs, np.ndarray):
        raise DataError(f"{name}: inputs are text; turn them into numbers")
    return Part(name, inputs, found)


def _generated(
    x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, ids: np.ndarray | None
) -> Dataset:
    return Dataset(
        train=samples(x[~test], y[~test]),
        test=samples(x[test], y[test]) if test.any() else None,
        classes=tuple(str(k) for k in range(num_classes)),
        ids=None if ids is None else ids[~test],
        groups={} if ids is None else {"train": {"device": ids[~test]}, "test": {"device": ids[test]}},
    )


def _positive(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise DataError(f"data.{name}={value}: give at least 1")
