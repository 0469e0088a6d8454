"""What of a model stays fixed or follows from its weights, and so has no place among the averaged statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

BATCH_NORM = nn.modules.batchnorm._NormBase
Buffer = tuple[nn.Module, str]


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that are in evaluation mode while ``model`` trains: those that its user, or its own ``train``, put there
    (a model that is in evaluation mode as a whole trains as a whole), and BatchNorm whose weights are all frozen."""
    modes = [(m, m.training) for m in model.modules()]
    given = {m for m, training in modes if not training} if model.training else set()
    model.train()
    frozen = [m for m, _ in modes if m in given or not m.training or _is_frozen(m)]
    for m, training in modes:
        m.training = training
    return frozen


def _is_frozen(layer: nn.Module) -> bool:
    own = list(layer.parameters(recurse=False)) if isinstance(layer, BATCH_NORM) else []
    return bool(own) and not any(p.requires_grad for p in own)


def apart(model: nn.Module) -> set[int]:
    """Ids of the buffers that are not averaged: of frozen layers, masks of pruned weights, and what spectral norm finds
    by power iteration (``fedsim.task.spectral``)."""
    out = {id(b) for m in frozen_layers(model) for b in m.buffers(recurse=False)}
    for layer, name in (*_masks(model), *_directions(model)):
        out.add(id(layer._buffers[name]))
    return out


def _masks(model: nn.Module) -> Iterator[Buffer]:
    for m in model.modules():
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                yield m, f"{hook._tensor_name}_mask"


def _directions(model: nn.Module) -> Iterator[Buffer]:
    for m in model.modules():
        if isinstance(m, _SpectralNorm) and "_u" in m._buffers:
            yield from ((m, "_u"), (m, "_v"))
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield from ((m, f"{hook.name}_u"), (m, f"{hook.name}_v"))


def places(model: nn.Module) -> dict[int, list[Buffer]]:
    """Where each buffer is registered, by its id: a tied one in several places."""
    out: dict[int, list[Buffer]] = {}
    for m in model.modules():
        for name, buffer in m._buffers.items():
            if isinstance(buffer, Tensor):
                out.setdefault(id(buffer), []).append((m, name))
    return out


def converted(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """``model`` in another type and place (itself), with dense gradients throughout, and whose tied buffers stay tied:
    ``nn.Module.to`` unties them."""
    ties = list(places(model).values())
    model.to(device=device, dtype=dtype)
    for (first, name), *others in ties:
        for layer, other in others:
            layer._buffers[other] = first._buffers[name]
    for m in model.modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag):
            m.sparse = False
    return model
