"""A model on its own again: a copy of the module, holding the weights of a run or of one client."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError, hint
from fedsim.task.copies import copied
from fedsim.task.fixed import converted
from fedsim.task.vectors import FlatModel, Weights


def standalone(
    model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, *, frozen_apart: bool = False
) -> nn.Module:
    """A copy of ``model`` in ``dtype`` that holds ``state``, in evaluation mode, on the CPU, sharing no memory.

    Every tensor keeps the type that it has in ``state``. ``frozen_apart``: tensors that are not trained may be missing,
    and stay those of ``model``.

    Raises:
        ConfigError: naming the tensor that is missing, unknown or misshapen.
    """
    out = converted(copy.deepcopy(model), dtype, "cpu")
    wanted = tensors(out)
    for name, value in state.items():
        if name not in wanted:
            raise ConfigError(
                f"model: {type(model).__name__} has no '{name}', which the run's weights have{hint(name, wanted)}; "
                "hand over the model that was trained: model=..."
            )
        if tuple(value.shape) != tuple(wanted[name].shape):
            raise ConfigError(
                f"model: '{name}' has shape {tuple(wanted[name].shape)} in {type(model).__name__}, but "
                f"{tuple(value.shape)} in the run's weights; hand over the model that was trained: model=..."
            )
    for name, own in wanted.items():
        if name not in state:
            if not (frozen_apart and not own.requires_grad):
                raise ConfigError(
                    f"model: the run's weights have no '{name}', which {type(model).__name__} has; hand over the model "
                    "that was trained: model=..."
                )
        elif own.dtype != state[name].dtype:
            own.data = own.data.to(state[name].dtype)
    out.load_state_dict({k: v.detach().cpu() for k, v in state.items()}, strict=False)
    return out.eval()


def state_of(
    prototype: nn.Module, dtype: torch.dtype, weights: Weights, without: Container[str] = ()
) -> dict[str, Tensor]:
    """The state dict of ``prototype``, which stays as it is, with ``weights``, but not the names ``without``."""
    return FlatModel(copied(prototype), dtype).state_dict(weights, without=without)


def present(prototype: nn.Module, flat: FlatModel, w: Tensor) -> nn.Module:
    """``prototype`` as it is in ``flat`` at ``w`` (d,), with the statistics of the moment; see ``standalone``."""
    return standalone(prototype, flat.state_dict(Weights(w, flat.buffers)), flat.w.dtype)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict themselves: parameters and buffers, by name."""
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def structure(state: Mapping[str, Tensor]) -> str:
    """Sha256 of names and shapes: models of the same structure take each other's weights."""
    text = json.dumps(sorted((name, list(t.shape)) for name, t in state.items()))
    return hashlib.sha256(text.encode()).hexdigest()
