"""What a client's own code returned: an update that can be folded, or an error that says what is wrong with it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError, returned
from fedsim.exchange.payload import Update

PLAIN = (float, int)
EXAMPLE = 'an Update, e.g. Update({"delta": job.delta(w)}, weight=len(job.data))'


def as_update(owner: object, method: str, found: object) -> Update:
    """What the method of a client returned, its weight and metrics as plain numbers.

    Raises:
        ClientError: naming class, method, and what was expected.
    """
    if not isinstance(found, Update):
        raise ClientError(returned(owner, method, found, EXAMPLE))
    weight, metrics = found.weight, found.metrics
    state = {} if found.state is None else found.state
    plain = type(found.arrays) is dict and type(found.values) is dict and type(metrics) is dict
    if not (plain and type(state) is dict):
        named = {"arrays": found.arrays, "values": found.values, "metrics": metrics, "state": state}
        for name, part in named.items():
            if not isinstance(part, Mapping):
                raise ClientError(returned(owner, method, part, "a dict with names", f"Update({name}=...)"))
    if weight.__class__ not in PLAIN:
        weight = _number(owner, method, "weight", weight)
    if weight < 0:
        raise ClientError(f"{_where(owner, method)}: Update(weight={weight}) is negative; expected 0 or more")
    for number in metrics.values():
        if number.__class__ not in PLAIN:
            metrics = {k: _number(owner, method, f"metrics[{k!r}]", v) for k, v in metrics.items()}
            break
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ClientError(returned(owner, method, value, "a tensor", f"Update(state[{name!r}])"))
    if weight is found.weight and metrics is found.metrics:
        return found
    return replace(found, weight=weight, metrics=metrics)


def bits_of(update: Update) -> list[object]:
    """What of an update enters the next model, to be compared; its metrics may be times."""
    held = {**update.arrays, **{f"state/{k}": v for k, v in (update.state or {}).items()}}
    bits = [(k, v.dtype, v.detach().contiguous().view(-1).view(torch.uint8)) for k, v in sorted(held.items())]
    plain = (repr(update.weight), repr(sorted(update.values.items())))
    return [*plain, *((name, dtype, v.cpu().numpy().tobytes()) for name, dtype, v in bits)]


def as_vector(owner: object, method: str, found: Any, like: torch.Size | None = None) -> Tensor:
    """What a rule returned as its weights: a tensor, after a step as long as before.

    Raises:
        ClientError: naming class, method, and what was expected.
    """
    if not isinstance(found, Tensor) or (like is not None and found.shape != like):
        shape = f" of shape {tuple(like)}" if like is not None else ""
        raise ClientError(returned(owner, method, found, f"the new w, a tensor{shape}"))
    return found


def check_shape(name: str, array: Any, like: Tensor) -> None:
    """Refuse a change of the received model in another shape: sums of such would be spread over all of it."""
    if array.shape != like.shape:
        raise ClientError(
            f"'{name}' has shape {tuple(array.shape)}, but the received model w has {tuple(like.shape)}; send "
            "job.delta(w), layout.expand what has no padding, or give what is no change of w another name"
        )


def _number(owner: object, method: str, name: str, value: object) -> float:
    """``value`` as a float, if it is one number: Python's, NumPy's or a tensor's."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, numbers.Real | np.bool_):
        raise ClientError(returned(owner, method, value, "one number", f"Update({name})"))
    return float(value)


def _where(owner: object, method: str) -> str:
    return f"{type(owner).__name__}.{method}"
