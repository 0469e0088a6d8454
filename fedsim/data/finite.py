"""Whether arrays hold numbers that a model can compute with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def first_nonfinite(x: Any) -> int | None:
    """The first sample with a NaN or an infinity."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel() or _plainly_finite(x):
        return None
    for start in range(0, len(x), 4096):  # a sum can overflow: look at the values themselves
        bad = ~torch.isfinite(single(x[start : start + 4096]))
        if bool(bad.any()):
            return start + int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
    return None


def _plainly_finite(x: Tensor) -> bool:
    """Whether all is well, by one quick pass: what is not finite makes the sum so."""
    if x.dtype != torch.float64:
        return bool(torch.isfinite(x.sum()))
    low, high = x.aminmax()  # NaN if one is
    return bool(torch.isfinite(single(torch.stack([low, high]))).all())


def single(x: Tensor) -> Tensor:
    """Doubles as most models read them, float32, in which 1e39 is infinite."""
    return x.float() if x.dtype == torch.float64 else x


def blurred(x: Any) -> int | None:
    """The first column of doubles (n, d) that float32 rounds by more than a tenth of its deviation."""
    if not isinstance(x, Tensor) or x.dtype != torch.float64 or x.dim() != 2 or len(x) < 2:
        return None
    lost = (x - single(x).double()).square().mean(0)
    spread = x.var(0, correction=0)
    bad = (lost > spread / 100) & (x.amax(0) > x.amin(0))
    return int(bad.nonzero()[0]) if bool(bad.any()) else None
