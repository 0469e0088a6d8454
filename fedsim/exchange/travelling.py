"""What can travel: arrays and plain values, checked and normalised by name."""

from __future__ import annotations

import numbers
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError

Scalar = bool | int | float | str | bytes
Number = TypeVar("Number", bound=Scalar)
Value = Scalar | list[int] | list[float] | list[str]


def checked_name(name: str) -> str:
    """The name of an array or value, if it is one."""
    if not isinstance(name, str) or not name:
        raise ClientError(f"payload names are non-empty strings, got {name!r}")
    return name


def as_array(name: str, value: Any) -> Tensor:
    """A tensor, of what can travel as one."""
    if type(value) is Tensor and value.dtype is not torch.bfloat16:
        return value.detach()
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise ClientError(f"array '{name}': object arrays cannot travel; send a numeric array")
        try:
            value = torch.from_numpy(np.require(value, requirements="C"))  # keeps 0-d arrays 0-d
        except TypeError as e:
            raise ClientError(
                f"array '{name}': {value.dtype} cannot travel; send a numeric array ({e})"
            ) from None
    if not isinstance(value, Tensor):
        raise ClientError(f"array '{name}': expected a tensor or numpy array, got {type(value).__name__}")
    if value.dtype == torch.bfloat16:
        raise ClientError(f"array '{name}': bfloat16 cannot travel; send .float() or .half()")
    return value.detach()


def as_value(name: str, value: Any) -> Value:
    """A plain value, of what can travel as one."""
    if type(value) is float:
        return value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        value = value.item()
    if isinstance(value, bool | int | float | bytes):
        return _short(name, value)
    if isinstance(value, str):
        if not value:
            raise ClientError(f"value '{name}': an empty string cannot travel; leave the key out")
        return value
    if isinstance(value, list | tuple):
        items = [v.item() if isinstance(v, np.generic) else v for v in value]
        kinds = {type(v) for v in items}
        if len(kinds) <= 1 and kinds <= {int, float, str}:
            return [_short(name, v) for v in items] if kinds == {int} else items
    if isinstance(value, numbers.Real):
        return float(value)
    raise ClientError(
        f"value '{name}': {type(value).__name__} cannot travel; "
        "send bool, int, float, str, bytes or a list of one of int, float, str (arrays belong in `arrays`)"
    )


def _short(name: str, value: Number) -> Number:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ClientError(f"value '{name}': {value} needs more than 64 bits; send text or a float")
    return value


def value_bytes(value: Value) -> int:
    """Bytes of a value's content."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(value_bytes, value))
    return 8
