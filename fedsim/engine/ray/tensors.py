"""How Ray pickles tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def share_tensors() -> None:
    """Pickle CPU tensors as numpy arrays, so that both sides of a transfer map shared memory instead of copying."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_to_numpy, deserializer=_from_numpy)
    ray.util.register_serializer(torch.nn.Parameter, serializer=_from_parameter, deserializer=_to_parameter)


AS_INTEGERS = {1: torch.uint8, 2: torch.int16}  # by bytes an entry: types that numpy lacks (bfloat16, float8)


def _to_numpy(t: Tensor) -> Any:
    t = t.detach().cpu().contiguous()
    try:
        return t.numpy()
    except TypeError:
        return t.view(AS_INTEGERS[t.itemsize]).numpy(), t.dtype


def _from_numpy(a: Any) -> Tensor:
    if isinstance(a, tuple):
        return _from_numpy(a[0]).view(a[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": every receiver treats these as read-only
        return torch.from_numpy(a)


def _from_parameter(p: torch.nn.Parameter) -> tuple[Any, bool]:
    return _to_numpy(p), p.requires_grad


def _to_parameter(parts: tuple[Any, bool]) -> torch.nn.Parameter:
    return torch.nn.Parameter(_from_numpy(parts[0]).clone(), requires_grad=parts[1])
