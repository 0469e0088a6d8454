"""Gradients of all trainable parameters, as they come and as one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from fedsim.errors import ClientError
from fedsim.task.layout import Layout

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = 1024.0  # of losses in float16, whose gradients would be rounded to zero; a power of two, so it costs no bit
PIECE = 2**20  # numbers whose squares are added up at a stretch

_backward: Callable[..., tuple[Tensor, ...]] = Variable._execution_engine.run_backward


class Gradients:
    """Gradients with respect to ``params``, which lie in a vector ``like`` (d,) as ``layout`` says.

    ``idle``: where parameters lie that had no part in the last loss.
    """

    def __init__(self, layout: Layout, like: Tensor, params: Sequence[Tensor]):
        self.idle: tuple[slice, ...] = ()
        self.scale, self._inputs = 1.0, tuple(params)
        self._one = torch.ones((), dtype=like.dtype, device=like.device)
        self._spans = [slot.span for slot in layout.params]
        self._parts, self._at = _template(layout, like)
        self._long = layout.dim > PIECE
        self._room = _room(layout.dim, torch.finfo(like.dtype).eps)

    def of(self, value: Tensor) -> tuple[Tensor, ...]:
        """``torch.autograd.grad(value, params, materialize_grads=True)`` by the engine underneath.

        Its checks of every argument in Python take a seventh of a small network's step.
        """
        one = self._one
        if value.dim() or value.dtype is not one.dtype:  # [loss], or a loss in another precision
            if value.numel() != 1:
                raise ClientError(
                    f"the loss of a batch must be one number, got shape {tuple(value.shape)}; average it"
                )
            one = torch.ones_like(value, requires_grad=False)
        if self.scale != 1:
            one = one * self.scale
        found = _backward((value,), (one,), False, False, self._inputs, True, accumulate_grad=False)
        if self.scale != 1:
            found = tuple(g if g is None else g / self.scale for g in found)
        grads: tuple[Tensor | None, ...] = found
        self.idle = ()
        for g in grads:
            if g is None:
                self.idle = tuple(s for s, g in zip(self._spans, grads, strict=True) if g is None)
                pairs = zip(self._inputs, grads, strict=True)
                return tuple(torch.zeros_like(p) if g is None else g for p, g in pairs)
        return found

    def joined(self, grads: Sequence[Tensor]) -> Tensor:
        """``grads`` as one vector (d,)."""
        parts = self._parts.copy()
        for i, g in zip(self._at, grads, strict=True):
            parts[i] = g.reshape(-1)
        return torch.cat(parts)

    def shorter(self, grads: Sequence[Tensor], bound: float) -> bool:
        """Whether the norm of ``grads`` together is below ``bound`` whatever the order in which squares are added up:
        then clipping by the norm of the flat gradient would leave it as it is. No vector is made for it."""
        squares, dot = 0.0, torch.dot
        for g in grads:
            flat = g.reshape(-1)
            if self._long and len(flat) > PIECE:
                squares += sum(dot(part, part).item() for part in torch.split(flat, PIECE))
            else:
                squares += dot(flat, flat).item()
        return squares < self._room * max(0.0, bound - 2e-6) ** 2  # not so if it is NaN


def halve(model: Any, kind: str | None) -> None:
    """Let ``model``, a ``FlatModel``, train with forward passes in half precision: ``bfloat16``, or ``float16`` with
    losses scaled by ``SCALE``; ``None``: off."""
    model.autocast = None if kind is None else HALVES[kind]
    model.backward.scale = SCALE if kind == "float16" else 1.0


def _room(dim: int, eps: float) -> float:
    """How large squares added up piece by piece may be, of the squared bound, if those of ``dim`` numbers added up at a
    stretch are to stay below it too: rounding is assumed to be at its worst, with four partial sums.

    Each addition to a positive sum is off by half of ``eps`` at most, and makes it grow by twice what is added at most.
    """
    here = 1 - 1.1 * min(dim, PIECE) / 4 * eps / 2
    there = max(0.5, 1 - dim / 4 * eps / 2)
    return max(0.0, here * there * (1 - 16 * eps))


def _template(layout: Layout, like: Tensor) -> tuple[list[Tensor], list[int]]:
    """What a gradient is put together from, with the zeros of its padding, and where each parameter's part goes."""
    parts, at, ends = list[Tensor](), list[int](), [*(s.offset for s in layout.params), layout.dim][1:]
    for slot, end in zip(layout.params, ends, strict=True):
        at.append(len(parts))
        parts.append(like)  # stands for the gradient
        if end > slot.span.stop:
            parts.append(like.new_zeros(end - slot.span.stop))
    return parts, at
