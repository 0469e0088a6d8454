"""Sub-models: the first share of the units of every hidden layer, as a model of its own and as places in the vector."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.models.split import call
from fedsim.task.layout import Layout
from fedsim.task.losses import Forward

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def narrow(
    model: nn.Module, width: float, example: Any, scale: bool = False, run: Forward = call
) -> tuple[nn.Module, Tensor]:
    """A copy of ``model`` with ``ceil(width * n)`` of the ``n`` units of each hidden layer, and its places.

    What comes into a layer is found by running ``example`` (B, ...) through, by ``run``; the last layer keeps its
    outputs. With ``scale``, hidden layers' outputs are divided by ``width`` while training (HeteroFL's Scaler).

    Returns:
        The sub-model and the indices ``(d_sub,)`` of its trainable parameters in the full vector ``(d,)``.

    Raises:
        ConfigError: if a layer with parameters is none of Linear, convolution without groups, GroupNorm, LayerNorm and
            Embedding.
    """
    sub = copy.deepcopy(model)
    full = Layout(model)
    places = full.named(torch.arange(full.dim))
    owner = {id(p): name for name, p in sub.named_parameters()}
    order = _called(sub, example, run)
    kept: dict[str, Tensor] = {}

    def cut(layer: nn.Module, name: str, *spans: slice) -> None:
        p = layer._parameters.get(name)
        if p is not None:
            key = owner[id(p)]
            layer._parameters[name] = nn.Parameter(p.detach()[spans].clone(), requires_grad=p.requires_grad)
            if key in places:
                kept[key] = places[key][spans].reshape(-1)

    def hook(last: bool) -> Callable[[nn.Module, Any], None]:
        def shrink(layer: nn.Module, given: Any) -> None:
            _shrink(layer, given[0], 1.0 if last else width, cut)

        return shrink

    hooks = [m.register_forward_pre_hook(hook(m is order[-1])) for m in order]
    _forward(sub, example, run)
    for h in hooks:
        h.remove()
    if scale and width < 1:
        for m in order[:-1]:
            if isinstance(m, (nn.Linear, nn.Embedding, *CONVS)):
                m.register_forward_hook(_Scaler(width))
    if not set(places) <= set(kept):
        raise ConfigError(f"model: '{sorted(set(places) - set(kept))[0]}' took no part in a forward pass")
    return sub, torch.cat([kept[slot.name] for slot in full.params])


class _Scaler:
    """Divides a layer's output by the width while training; a class, so that it can be pickled."""

    def __init__(self, width: float):
        self.width = width

    def __call__(self, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output / self.width if layer.training else output


def _shrink(layer: nn.Module, x: Tensor, width: float, cut: Callable[..., None]) -> None:
    """Cut one layer to what comes in and to the share ``width`` of what goes out."""
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = x.shape[-1], math.ceil(width * layer.out_features)
        cut(layer, "weight", slice(layer.out_features), slice(layer.in_features))
        cut(layer, "bias", slice(layer.out_features))
    elif isinstance(layer, CONVS) and layer.groups == 1:
        layer.in_channels, layer.out_channels = x.shape[1], math.ceil(width * layer.out_channels)
        cut(layer, "weight", slice(layer.out_channels), slice(layer.in_channels))
        cut(layer, "bias", slice(layer.out_channels))
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = math.ceil(width * layer.embedding_dim)
        cut(layer, "weight", slice(None), slice(layer.embedding_dim))
    elif isinstance(layer, nn.GroupNorm) and x.shape[1] % layer.num_groups == 0:
        layer.num_channels = x.shape[1]
        cut(layer, "weight", slice(layer.num_channels))
        cut(layer, "bias", slice(layer.num_channels))
    elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        layer.normalized_shape = (x.shape[-1],)
        cut(layer, "weight", slice(x.shape[-1]))
        cut(layer, "bias", slice(x.shape[-1]))
    else:
        raise ConfigError(
            f"model: {layer} cannot be cut to a width; widths need layers of Linear, convolutions without groups, "
            "GroupNorm whose groups divide the remaining channels, LayerNorm and Embedding"
        )


def _called(model: nn.Module, example: Any, run: Forward) -> list[nn.Module]:
    """Layers with parameters of their own, in the order of their first call."""
    order: list[nn.Module] = []

    def note(layer: nn.Module, given: Any) -> None:
        if layer not in order:
            order.append(layer)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if m._parameters]
    _forward(model, example, run)
    for h in hooks:
        h.remove()
    return order


def _forward(model: nn.Module, example: Any, run: Forward) -> None:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        run(model, example)
    for m, training in modes:
        m.training = training
