"""Whether a loss or metric of the user's lets each output meet its own target, and not those of all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.data.local import Batch
from fedsim.errors import ConfigError


def check_meeting(functions: Mapping[str, Callable[[Any, Any], Any]], output: Any, batch: Batch) -> None:
    """Refuse functions (output, y) that take outputs (n, 1) and targets (n,), or the reverse, for a table of (n, n)
    pairs, as ``(output - y) ** 2`` does: it gives one number where both have one shape, and another where not.

    Raises:
        ConfigError: names the function, and what to write.
    """
    y = batch.y
    if not isinstance(output, Tensor) or not isinstance(y, Tensor) or len(y) < 2:
        return
    o, n = output.detach(), len(y)
    if (tuple(o.shape), tuple(y.shape)) not in (((n, 1), (n,)), ((n,), (n, 1))):
        return
    spread = torch.arange(n, device=y.device)
    apart = o + spread.to(o).view(
        o.shape
    )  # those of an untrained model may be all alike, and some targets too
    pairs = [(of, to) for of in (o, apart) for to in (y, y + spread.to(y.dtype).view(y.shape))]
    if y.is_floating_point():
        pairs.append((apart, apart.reshape(y.shape).to(y) + 0.3))
    for name, function in functions.items():
        for of, to in pairs:
            given = _value(function, of, to)
            flat, column = (
                _value(function, of.reshape(shape), to.reshape(shape)) for shape in ((n,), (n, 1))
            )
            if given is None or flat is None or column is None:
                continue
            if math.isclose(flat, column, rel_tol=1e-5) and not math.isclose(given, flat, rel_tol=1e-5):
                shorter = "output" if o.dim() == 2 else "y"
                raise ConfigError(
                    f"{name}: for outputs of shape {tuple(o.shape)} and targets of shape {tuple(y.shape)} each output "
                    f"meets the targets of all samples; give both one shape, as by {shorter}.squeeze(1)"
                )


def _value(function: Callable[[Any, Any], Any], o: Tensor, y: Tensor) -> float | None:
    try:
        found = function(o.clone(), y.clone())
        total, count = found if isinstance(found, tuple) else (found, 1)
        return float(total) / float(count)
    except Exception:  # any of the user's, which may not take such shapes
        return None
