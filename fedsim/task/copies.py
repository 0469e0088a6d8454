"""Copies of a model, and its way to another process, where torch's own refuse."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import _inject_new_class, _inject_property, is_parametrized

from fedsim.task.mapped import clones, place_of

DEPTH = 3  # of containers that are looked into


def copyable(model: nn.Module) -> nn.Module:
    """``model``, or a copy whose plain attributes hold no results of a computation, which cannot be copied: what
    pruning and the older weight_norm and spectral_norm leave there until the next forward pass, or a hidden state."""
    results = [t for m in model.modules() for t in _results(list(vars(m).values()), DEPTH)]
    return copied(model, {id(t): t.detach().clone() for t in results}) if results else model


def copied(model: nn.Module, others: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy to work with. What lies in shared memory (``fedsim.task.mapped``) is not copied, but mapped again.

    ``others``: what takes the place of further tensors, by their ids.
    """
    memo: dict[int, Any] = dict(others or {})
    shared = [t for t in (*model.parameters(), *model.buffers()) if place_of(t) is not None]
    for t, again in zip(shared, clones(shared), strict=True):
        memo[id(t)] = nn.Parameter(again, requires_grad=False) if isinstance(t, nn.Parameter) else again
    if not any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return copy.deepcopy(model, memo)
    with torch.no_grad():  # whose copies would else be results, with the originals as their leaves
        made = copy.deepcopy(model, memo)
    for p, q in zip(model.parameters(), made.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    return made


def values_of(named: Mapping[str, Tensor], prototype: nn.Module) -> dict[str, Tensor]:
    """What the tensors ``named`` of a copy hold, to be read: where these are the same, those of its ``prototype``, to
    which nobody writes."""
    held = {**dict(prototype.named_parameters()), **dict(prototype.named_buffers())}
    found, others = dict[str, Tensor](), dict[str, Tensor]()
    for name, t in named.items():
        like = held.get(name)
        apart = like is not None and like.data_ptr() != t.data_ptr() and like.dtype == t.dtype
        if like is not None and apart and like.shape == t.shape and like.device == t.device:
            found[name] = like.detach()
        else:
            others[name] = t
    found |= dict(zip(others, clones(others.values()), strict=True))
    return {name: found[name] for name in named}


def _results(values: list[Any], depth: int) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        elif depth and isinstance(value, list | tuple):
            yield from _results(list(value), depth - 1)
        elif depth and isinstance(value, dict):
            yield from _results(list(value.values()), depth - 1)


class Portable:
    """A model that pickle takes although layers are parametrised: their classes, made on the fly, are made again."""

    def __init__(self, model: nn.Module):
        self._model = _plain(model, {})

    @staticmethod
    def packed(model: nn.Module) -> nn.Module | Portable:
        """``model`` itself where pickle takes it."""
        return Portable(model) if any(map(is_parametrized, model.modules())) else model

    def unpacked(self) -> nn.Module:
        """The model again, to be called once."""
        for layer in self._model.modules():
            if is_parametrized(layer):
                _inject_new_class(layer)
                for name in layer.parametrizations:  # type: ignore[union-attr]
                    _inject_property(layer, name)
        return self._model


def _plain(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """``model`` with the layers' own classes, sharing all tensors."""
    if id(model) not in made:
        kind: Any = type(model).__mro__[1] if is_parametrized(model) else type(model)
        made[id(model)] = new = kind.__new__(kind)
        inner = {k: m if m is None else _plain(m, made) for k, m in model._modules.items()}
        new.__dict__.update({**vars(model), "_modules": inner})
    return made[id(model)]
