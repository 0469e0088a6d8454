"""Running statistics of BatchNorm: which layers collect them, and how they are replaced by plain means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedsim.task.fixed import BATCH_NORM


def collecting(model: nn.Module) -> list[BATCH_NORM]:
    """The layers of ``model`` that move their running statistics when it trains."""
    norms = (m for m in model.modules() if isinstance(m, BATCH_NORM))
    return [m for m in norms if m.track_running_stats and m.training]


def collect(norms: Sequence[BATCH_NORM], model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of ``norms`` by plain means over ``batches`` (B, ...) at the model's present weights."""
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum, m.track_running_stats = None, True  # None: the mean over all batches
    try:
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
