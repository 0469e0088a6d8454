"""Which test samples two methods classify differently, from ``predictions.npz`` of their runs."""

from __future__ import annotations

from zipfile import BadZipFile

import numpy as np

from fedsim.errors import ConfigError, DataError
from fedsim.report.arms import Arm
from fedsim.report.runs import Run

FILE = "predictions.npz"


def differing_samples(a: Arm, b: Arm) -> np.ndarray:
    """For each test sample (N,) how often a is right minus how often b is, meaned over their common seeds.

    Raises:
        ConfigError: naming a run without the file.
        DataError: if the test sets differ in size.
    """
    seeds = sorted(a.runs.keys() & b.runs.keys())
    rows = [[_right(arm.runs[seed]) for arm in (a, b)] for seed in seeds]
    if len({len(right) for both in rows for right in both}) > 1:
        raise DataError(f"--population: {a.name} and {b.name} were tested on different numbers of samples")
    return np.mean([one - other for one, other in rows], axis=0) if rows else np.zeros(2)


def _right(run: Run) -> np.ndarray:
    path = run.dir / FILE
    try:
        with np.load(path) as file:
            return np.asarray(file["right"], dtype=np.float64)
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise ConfigError(
            f"--population: {path}: no record of which samples were right ({type(error).__name__}); compute the run "
            "with evaluation.predictions=true (one that is finished also with resume=never)"
        ) from None
