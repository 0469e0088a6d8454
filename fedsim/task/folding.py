"""Adapters of peft on a base that has changed, as models that know nothing of changes: merged, or adapters again."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, cast

from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.adapters import adapted
from fedsim.task.copies import copied
from fedsim.task.lowrank import CHANGE, MORE, layers_of, truncated


def base_has_changed(model: nn.Module) -> bool:
    """Whether the base of an adapter has a place for a change (``fedsim.task.lowrank.changeable``)."""
    return any(CHANGE in m._buffers for m in model.modules())


def several(model: nn.Module) -> bool:
    """Whether more than one adapter is active in ``model``: no single one is the model then."""
    held = adapted(model)
    return held is not None and len(cast(Any, held[1]).active_adapters) > 1


def merged(model: nn.Module) -> nn.Module:
    """The base of the adapted ``model``, a copy, with changes and adapters in its weights: added in float32, then cast.
    A weight that another layer shares is parted from that first: the other layer has no adapter.

    Raises:
        ConfigError: if it is no model of peft.
    """
    out, inner = _peft_of(model)
    kinds = {n: p.dtype for n, p in inner.get_base_model().named_parameters()}
    out.float()
    layers = list(layers_of(out))
    for layer in layers:
        _part(out, layer.base, inner)
    for layer in layers:
        _take_out(layer.base, into=True)
    whole: nn.Module = inner.merge_and_unload()
    for name, p in whole.named_parameters():
        p.data = p.data.to(kinds.get(name, p.dtype))
    return whole


def _part(model: nn.Module, base: Any, inner: Any) -> None:
    """Give ``base`` a weight of its own, if another layer of ``model`` shares it."""
    holders = [m for m in model.modules() for p in m.parameters(recurse=False) if p is base.weight]
    if len(holders) > 1:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        inner.get_base_model().config.tie_word_embeddings = False


def lowered(model: nn.Module, rank: int) -> tuple[nn.Module, float]:
    """The adapted ``model`` with one adapter of ``rank`` that comes as near as possible to changes and active adapters
    together, and how near: ``|B A - change| / |change|`` over all layers.

    Raises:
        ConfigError: if it is no model of peft, computes with more than products, or ``rank`` is not positive.
    """
    import peft

    if rank < 1:
        raise ConfigError(f"--rank {rank}: give a whole number from 1")
    out, inner = _peft_of(model)
    changes, biases = _changes(out, inner.active_adapters)
    config: Any = copy(inner.peft_config[inner.active_adapters[0]])
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank, rank, {}, {}
    config.use_rslora, config.lora_bias = False, bool(biases)
    names = {key: key.removeprefix("base_model.model.") for key in changes}
    config.target_modules = set(names.values())
    new: nn.Module = peft.get_peft_model(inner.unload(), config)
    whole = lost = 0.0
    for key, change in changes.items():
        a, b, error = truncated(change, rank)
        size = float(change.double().square().sum())
        whole, lost = whole + size, lost + error**2 * size
        _put(new.get_submodule(f"base_model.model.{names[key]}"), a, b, biases.get(key))
    return new.eval(), (lost / whole) ** 0.5 if whole else 0.0


def _changes(model: nn.Module, active: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each layer's adapters and change of the base come to, (out, in), and what they add besides, (out,)."""
    changes, biases = dict[str, Tensor](), dict[str, Tensor]()
    for layer in layers_of(model):
        if layer.key not in active:
            continue
        if any(len(getattr(model.get_submodule(layer.name), k, ())) for k in MORE):
            raise ConfigError(
                f"--rank: '{layer.name}' computes with more than W + s B A (use_dora and the like); leave it out"
            )
        a, b = (model.get_parameter(n).detach().float() for n in (layer.a, layer.b))
        if a.dim() != 2:
            raise ConfigError(f"--rank: the factors of '{layer.name}' are no matrices; leave it out")
        found = layer.scale * b @ a
        if (more := _take_out(layer.base, into=False)) is not None:
            found = found + (more.T if layer.transposed else more).float()
        changes[layer.name] = changes[layer.name] + found if layer.name in changes else found
        bias = dict(model.named_parameters()).get(f"{layer.b.removesuffix('weight')}bias")
        if bias is not None:
            biases[layer.name] = biases.get(layer.name, 0) + layer.scale * bias.detach().float()
    return changes, biases


def _put(layer: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Factors into the adapter of a layer, which has the name that peft gives by default; unused ranks are zero."""
    embedding = "default" in layer.lora_embedding_A
    own: Any = [layer.lora_embedding_A, layer.lora_embedding_B] if embedding else [layer.lora_A, layer.lora_B]
    own_a, own_b = ((t["default"] if embedding else t["default"].weight).data for t in own)
    for t, part in ((own_a, a), (own_b.T, b.T)):
        t.zero_()
        t[: len(part)] = part
    if bias is not None:
        layer.lora_B["default"].bias.data.copy_(bias)


def _peft_of(model: nn.Module) -> tuple[nn.Module, Any]:
    """A copy of ``model`` and the ``PeftModel`` that it is."""
    out = copied(model)
    if (held := adapted(out)) is None or held[0]:
        raise ConfigError(
            f"--to hf: {type(model).__name__} is no model of peft, which alone writes adapters; use --to safetensors"
        )
    return out, held[1]


def _take_out(base: nn.Module, *, into: bool) -> Tensor | None:
    """The change of a base, which it has no more; added to its weight if ``into``."""
    change = base._buffers.pop(CHANGE, None)
    if change is None:
        return None
    base._non_persistent_buffers_set.discard(CHANGE)
    base._forward_hooks.clear()
    weight: Any = base.weight
    if into:
        weight.data = weight.data + change.to(weight.dtype)
    return change
