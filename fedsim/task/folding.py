"""Adapters of peft on a base that has changed, as models that know nothing of changes: merged, or adapters again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.adapters import adapted
from fedsim.task.copies import copied
from fedsim.task.lowrank import CHANGE, layers_of, truncated


def base_has_changed(model: nn.Module) -> bool:
    """Whether the base of an adapter has a place for a change (``fedsim.task.lowrank.changeable``)."""
    return any(CHANGE in m._buffers for m in model.modules())


def merged(model: nn.Module) -> nn.Module:
    """The base of the adapted ``model``, a copy, with changes and adapters in its weights: added in float32, then cast.

    Raises:
        ConfigError: if it is no model of peft.
    """
    out, inner = _peft_of(model)
    kinds = {n: p.dtype for n, p in inner.get_base_model().named_parameters()}
    out.float()
    for layer in layers_of(out):
        _take_out(layer.base, into=True)
    whole: nn.Module = inner.merge_and_unload()
    for name, p in whole.named_parameters():
        p.data = p.data.to(kinds.get(name, p.dtype))
    return whole


def lowered(model: nn.Module, rank: int) -> tuple[nn.Module, float]:
    """The adapted ``model`` with adapters of ``rank`` that come as near as possible to changes and adapters together,
    and how near: ``|B A - change| / |change|`` over all layers.

    Raises:
        ConfigError: if it is no model of peft, or ``rank`` is not positive.
    """
    import peft

    if rank < 1:
        raise ConfigError(f"--rank {rank}: give a whole number from 1")
    out, inner = _peft_of(model)
    found, whole, lost = dict[str, tuple[Tensor, Tensor]](), 0.0, 0.0
    for layer in layers_of(out):
        a, b = (out.get_parameter(n).detach().float() for n in (layer.a, layer.b))
        change = layer.scale * b @ a
        if (more := _take_out(layer.base, into=False)) is not None:
            change = change + (more.T if layer.transposed else more).float()
        least_a, least_b, error = truncated(change, rank)
        found[layer.name] = least_a, least_b
        whole += float(change.double().square().sum())
        lost += error**2 * float(change.double().square().sum())
    (name,) = inner.active_adapters
    config: Any = inner.peft_config[name]
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank, rank, {}, {}
    config.use_rslora = False
    names = {key: key.removeprefix("base_model.model.") for key in found}
    new: nn.Module = peft.get_peft_model(inner.unload(), config)
    for key, (least_a, least_b) in found.items():
        layer_of: Any = new.get_submodule(f"base_model.model.{names[key]}")
        size = min(rank, *least_a.shape[:1])
        own_a, own_b = layer_of.lora_A["default"].weight.data, layer_of.lora_B["default"].weight.data
        for t, part in ((own_a, least_a), (own_b.T, least_b.T)):
            t.zero_()
            t[:size] = part
    return new.eval(), (lost / whole) ** 0.5 if whole else 0.0


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
