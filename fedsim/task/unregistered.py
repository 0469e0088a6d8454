"""Tensors that the loss depends on and that no optimiser would see: layers in a plain list, tensors as attributes,
parameters of a loss. A plain training loop leaves them as they are too, without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn


def unregistered(loss: Tensor, model: nn.Module) -> str:
    """What to say of tensors with a gradient in ``loss`` that are no parameters of ``model``; empty if none are."""
    known = {id(p) for p in model.parameters()}
    shapes = [str(tuple(t.shape)) for t in _leaves(loss) if id(t) not in known]
    if not shapes:
        return ""
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return (
        f"model: the loss depends on tensors of shape {', '.join(shapes[:3])}{more} that have a gradient, but are no "
        "parameters of the model (layers in a plain list or dict, a tensor as attribute, parameters of the loss?): "
        "not trained. Make them nn.ModuleList, nn.Parameter or a layer of the model, or set requires_grad=False if "
        "that is meant"
    )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Every tensor in which the gradient of ``loss`` would be gathered."""
    seen, todo = set[Any](), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (held := getattr(node, "variable", None)) is not None:
            yield held
        todo += _before(node)


def _before(node: Any) -> Collection[Any]:
    return [before for before, _ in node.next_functions]
