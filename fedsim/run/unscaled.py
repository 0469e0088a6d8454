"""Pixels that were handed over in Python as whole numbers, 0 to 255, and are trained on as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.data.trees import named_leaves
from fedsim.run.given import Given

ROWS = 64  # samples that are looked at
FEW = 64  # numbers from which on a row of bytes is taken for an image of 8 x 8 pixels, and not for a table


def unscaled(config: DictConfig, given: Given, data: FederatedData) -> str:
    """What to say of inputs that look like pixels nobody scales; empty if there are none."""
    handed = given.clients is not None or given.data is not None
    if not handed or config.encoder or data.dataset.normalize is not None or not len(data.dataset.train):
        return ""
    whole = given.data is not None
    before = given.data.train.x if whole and hasattr(given.data.train, "x") else None
    if given.clients is not None:
        before = next((x for x, _ in given.clients if any(len(t) for _, t in named_leaves(x))), None)
    train = data.dataset.train
    taken, _ = train.take(torch.arange(min(ROWS if train.sliceable else 2, len(train))))
    for name, kind, high in _pixels(before, taken):
        top = 255 if high < 256 else 65535
        way = (
            f", or Dataset(Samples(x, y), normalize=Normalize(1 / {top})), which takes less memory"
            if whole
            else ""
        )
        return (
            f"{'data' if whole else 'clients'}: x{name} holds whole numbers up to {high} ({kind}) and is trained on as "
            f"it is, not scaled to [0, 1]; hand over x / {top}{way}, unless the model scales it"
        )
    return ""


def _pixels(before: Any, taken: Any) -> Iterator[tuple[str, str, int]]:
    """Name, type and largest number of each input (n, ...) that looks like pixels; ``before`` as it was handed over."""
    was = {name: getattr(t, "dtype", None) for name, t in named_leaves(before)}
    for name, t in named_leaves(taken):
        if not isinstance(t, Tensor) or not t.numel():
            continue
        kind, low, high = was.get(name, t.dtype), float(t.min()), float(t.max())
        if kind == torch.uint8:
            image = t.dim() > 2 or t[0].numel() >= FEW
        elif kind is not None and not kind.is_floating_point and kind != torch.bool:
            taken_as_numbers = t.is_floating_point()  # else they may be tokens
            image = t.dim() > 3 or (
                taken_as_numbers and (t.dim() == 3 or (t[0].numel() >= FEW and 127 < high < 256))
            )
        else:
            continue
        if image and low >= 0 and high > 1:
            yield name, str(kind).removeprefix("torch."), int(high)
