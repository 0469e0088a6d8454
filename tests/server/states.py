"""A state of a client that holds one number, and that number back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def state(value: float, size: int = 4) -> dict[str, Tensor]:
    return {"h": torch.full((size,), float(value)), "n": torch.tensor(int(value))}


def value(kept: Any) -> float | None:
    if not kept:
        return None
    assert set(kept) == {"h", "n"}
    assert (kept["h"] == kept["h"][0]).all()
    assert int(kept["n"]) == int(kept["h"][0])
    return float(kept["h"][0])
