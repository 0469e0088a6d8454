"""The golden quadratic problem as ``reference`` takes it, and the comparison with what it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import reference
from problems import golden

Z = golden()
GRADIENTS = reference.affine(Z["A"], Z["b"])
COHORTS = [np.flatnonzero(row).tolist() for row in Z["active"]]


def close(actual: Any, expected: Any, atol: float = 1e-10) -> None:
    """Equal up to ``atol``, whatever their kinds of array."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)
