"""A model looked at once, before round 1: what cannot be trained is refused in one line, what is unusual is noted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsim.errors import ConfigError
from fedsim.task.adapters import refuse_untied
from fedsim.task.copies import copyable
from fedsim.task.mapped import share
from fedsim.task.slots import finite


def admitted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model``, or a copy of it that can be copied again, if it can be trained in ``dtype``. Large tensors of it that
    stay as they are lie in shared memory from now on.

    Raises:
        ConfigError: naming the layer, and what to do.
    """
    for name, layer in model.named_modules():
        if ".quantized." in type(layer).__module__:
            raise ConfigError(
                f"model: '{name}' is quantised ({type(layer).__name__}) and cannot be trained; hand over the model "
                "of floating-point numbers, and quantise what the run gives"
            )
    for name, t in _tensors(model):
        _refuse(model, name, t, dtype)
        _refuse_hooks(name, t)
    _refuse_overlaps(model)
    refuse_untied(model)
    return copyable(share(model))


def refuse_nonfinite(model: nn.Module) -> None:
    """Refuse weights to start from that are not finite: every client would fail.

    Raises:
        ConfigError: naming the parameter.
    """
    for name, p in model.named_parameters():
        if not p.requires_grad or p.is_meta or finite(p.detach()):
            continue
        if bad := int((~torch.isfinite(p)).sum()):
            raise ConfigError(
                f"model: '{name}' holds NaN or infinity ({bad} of {p.numel()} numbers), so every client would fail; "
                "initialise it (layer.reset_parameters()), or hand over finite weights as initial="
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _refuse(model: nn.Module, name: str, t: Tensor, dtype: torch.dtype) -> None:
    if is_lazy(t):
        layer, _, own = name.rpartition(".")
        kind = type(model.get_submodule(layer)).__name__
        raise ConfigError(
            f"model: '{layer or own}' ({kind}) takes its shape from the first batch, which it has not seen; run one "
            "through the model first: model(x)"
        )
    if t.is_complex():
        raise ConfigError(
            f"model: '{name}' is complex, but models are trained in {_called(dtype)}; hold real and imaginary part in "
            "one tensor (..., 2), and take torch.view_as_complex of it in the forward pass"
        )
    if isinstance(t, nn.Parameter) and t.is_floating_point() and t.dtype.itemsize > dtype.itemsize:
        raise ConfigError(
            f"model: '{name}' is {_called(t.dtype)}, but models are trained in {_called(dtype)}; type "
            f"dtype={_called(t.dtype)}, or hand over model.{_CASTS.get(dtype, 'to(...)')}"
        )
    if t.layout != torch.strided or t.is_quantized:
        raise ConfigError(f"model: '{name}' is no plain dense tensor; hand over {name}.to_dense()")


def _refuse_hooks(name: str, t: Tensor) -> None:
    """Gradients are taken by the whole vector: hooks of single parameters would never be called."""
    for register, held in (
        ("register_hook", t._backward_hooks),
        ("register_post_accumulate_grad_hook", t._post_accumulate_grad_hooks),
    ):
        if held:
            raise ConfigError(
                f"model: '{name}' has a hook on its gradient ({register}), which would never be called; hook onto its "
                "layer (register_full_backward_hook), compute with a changed weight in forward (self.weight * mask), "
                "freeze it (requires_grad_(False)), or give it a rate of its own (client.groups)"
            )


_CASTS = {torch.float32: "float()", torch.float64: "double()"}


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_overlaps(model: nn.Module) -> None:
    """Tensors that are several, but share memory, would be trained apart."""
    taken: dict[tuple[object, int], list[tuple[int, int, str, Tensor]]] = {}
    for name, t in _tensors(model):
        if not t.numel() or t.device.type == "meta":
            continue
        start = t.data_ptr()
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        end = start + (last + 1) * t.element_size()
        pieces = taken.setdefault((t.device, t.untyped_storage().data_ptr()), [])
        for a, b, other, one in pieces:
            if a < end and start < b and (one.requires_grad or t.requires_grad):
                raise ConfigError(
                    f"model: '{name}' and '{other}' share memory, but are two tensors, which would part in training; "
                    "make them one (register the same Parameter twice), or hand over copies (.clone())"
                )
        pieces.append((start, end, name, t))
