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


def averaged(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The floating-point buffers that are part of the state dict and do not stay fixed, by name."""
    saved, fixed = model.state_dict(keep_vars=True), apart(model)
    return [
        (n, b)
        for n, b in model.named_buffers()
        if b is not None and b.is_floating_point() and n in saved and id(b) not in fixed
    ]


def apart(model: nn.Module) -> set[int]:
    """Ids of the buffers that are not averaged: ``still`` ones, and what spectral norm finds by power iteration
    (``fedsim.task.spectral``)."""
    return still(model) | {id(layer._buffers[name]) for layer, name in _directions(model)}


def still(model: nn.Module) -> set[int]:
    """Ids of the buffers that stay as they are: of frozen layers, of quantised weights, masks of pruned weights."""
    layers = (*frozen_layers(model), *_quantised(model))
    out = {id(b) for m in layers for b in m.buffers(recurse=False)}
    return out | {id(layer._buffers[name]) for layer, name in _masks(model)}


def _quantised(model: nn.Module) -> Iterator[nn.Module]:
    """Layers without trainable parameters whose buffers hold weights in 8 or 16 bits, most often with scales beside."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    for m in model.modules():
        if isinstance(m, BATCH_NORM) or any(p.requires_grad for p in m.parameters(recurse=False)):
            continue
        narrow = wide = 0
        for b in m.buffers(recurse=False):
            if is_narrow(b) and b.dtype not in trained:
                narrow += b.numel()
            else:
                wide += b.numel()
        if narrow > wide:
            yield m


def is_narrow(t: Tensor) -> bool:
    """Whether ``t`` holds numbers of 8 or 16 bits."""
    return t.dtype.itemsize < 4 and t.dtype != torch.bool


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
    ``nn.Module.to`` unties them. Frozen numbers of 16 bits and less stay as they are (``kept_narrow``)."""
    ties = list(places(model).values())
    if kept := kept_narrow(model):

        def convert(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() and id(t) not in kept else t.dtype)

        model._apply(convert)  # type: ignore[no-untyped-call]  # what nn.Module.to calls
    else:
        model.to(device=device, dtype=dtype)
    for (first, name), *others in ties:
        for layer, other in others:
            layer._buffers[other] = first._buffers[name]
    for m in model.modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag):
            m.sparse = False
    return model


def kept_narrow(model: nn.Module) -> set[int]:
    """Ids of the frozen parameters and fixed buffers that keep their type of 16 bits or less.

    Where trainable parameters are of that type too, the model is one of that type as a whole, and is converted as one.
    """
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    narrow = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and is_narrow(t)]
    found = {id(t) for t in narrow if not t.requires_grad and t.dtype not in trained}
    return found - {id(b) for _, b in averaged(model)} if found else found
