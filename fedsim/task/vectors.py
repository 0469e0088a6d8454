"""Flat vectors: all trainable parameters of a model as one tensor ``(d,)``, all statistics as another ``(b,)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fedsim.errors import ClientError
from fedsim.rng import hash_tensors
from fedsim.task.layout import BATCH_NORM, Layout

_backward: Callable[..., tuple[Tensor, ...]] = Variable._execution_engine.run_backward
DROPOUT = (nn.modules.dropout._DropoutNd, nn.RReLU)


class Weights(NamedTuple):
    """A model as vectors: parameters ``w`` (d,) and floating-point buffers ``buffers`` (b,); or a stack of models."""

    w: Tensor
    buffers: Tensor

    def pieces(self, layout: Layout) -> Iterator[Tensor]:
        """The model's numbers in order, as views; padding is left out."""
        yield from layout.params.pieces(self.w)
        yield from layout.buffers.pieces(self.buffers)

    def hash(self, layout: Layout) -> str:
        """Sha256 of the bytes of the model's numbers (equal hashes mean equal bits); padding has no part in it."""
        return hash_tensors(self.pieces(layout))


class FlatModel:
    """A module whose parameters are views of one vector, and whose gradients come back as one vector.

    ``w`` (d,) and ``buffers`` (b,) are resident: a client is loaded by copying into them. Evaluating the gradient at
    another vector points the parameters there and copies nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        aligned: bool = True,
    ):
        """``aligned=False``: vectors without padding (see ``Layout``)."""
        self.module = model.to(device=device, dtype=dtype)
        self.layout = layout = Layout(model, dtype, aligned=aligned)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self.w = layout.flatten(dict(model.named_parameters()), dtype)
        shapes = [torch.empty(s.shape, device="meta") for s in layout.params]
        self._places = [(t.shape, t.stride(), s.offset) for t, s in zip(shapes, layout.params, strict=True)]
        self._parts, self._at = _template(layout, self.w)
        self.buffers = torch.zeros(layout.buffer_dim, dtype=dtype, device=device)
        for slot in layout.buffers:
            owner, _, name = slot.name.rpartition(".")
            module = model.get_submodule(owner)
            view = self.buffers[slot.span].view(slot.shape)
            module._buffers[name] = view.copy_(module._buffers[name])  # type: ignore[arg-type]
        self._initial_buffers = self.buffers.clone()
        flat = {slot.name for slot in layout.buffers}
        self._counters = [b for n, b in model.named_buffers() if n not in flat]
        self._counts = [b.clone() for b in self._counters]
        self._stats = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
        self.draws = any(isinstance(m, DROPOUT) for m in model.modules())
        self._mask_state: Tensor | None = None
        self.autocast: torch.dtype | None = None  # mixed precision of forward passes while training
        self._bound: Tensor | None = None
        self.bind(self.w)
        self._views = [p.data for p in self._params]
        self._inputs, self._one = tuple(self._params), torch.ones((), dtype=dtype, device=device)

    @property
    def weights(self) -> Weights:
        """The resident vectors themselves (not copies)."""
        return Weights(self.w, self.buffers)

    def bind(self, w: Tensor) -> None:
        """Point the parameters at ``w`` (d,).

        Raises:
            ClientError: if it has another length than the model's vectors.
        """
        if w is self._bound:
            return
        if w.shape != self.w.shape:
            raise ClientError(
                f"a vector of shape {tuple(w.shape)} for a model whose vectors are ({self.layout.dim},); "
                f"layout.expand makes one of the {self.layout.size} numbers alone"
            )
        self._bound, start = w, w.storage_offset()
        if not w.is_contiguous():
            self._bound, start, w = None, 0, w.contiguous()
        for p, (shape, stride, offset) in zip(self._params, self._places, strict=True):
            p.data = w.as_strided(shape, stride, start + offset)

    def load(self, w: Tensor, buffers: Tensor | None = None) -> Tensor:
        """Copy a model into the resident vectors and return the resident ``w``.

        Counters, and without ``buffers`` the statistics too, go back to their initial values.
        """
        self.bind(self.w)
        self.w.copy_(w)
        if self.layout.buffer_dim:
            self.buffers.copy_(self._initial_buffers if buffers is None else buffers)
        for counter, value in zip(self._counters, self._counts, strict=True):
            counter.copy_(value)
        return self.w

    def grad(
        self,
        w: Tensor,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Any, Tensor], Tensor],
        *,
        again: bool = False,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient (d,) and loss () of one batch at ``w``; a fresh tensor each time.

        ``forward(module, x)`` replaces ``module(x)``. ``again=True`` is a second look at the same batch: dropout masks
        are those of the first, and running statistics are not updated twice.
        """
        # whatever the layers: masks are also drawn by functions (F.dropout, attention), unseen from here
        if not again:
            self._mask_state = torch.get_rng_state()
        elif self._mask_state is not None:
            torch.set_rng_state(self._mask_state)
        value = self._loss(w, x, y, loss, forward, count=not again)
        parts = self._parts.copy()
        for i, g in zip(self._at, self._gradients(value), strict=True):
            parts[i] = g.reshape(-1)
        return torch.cat(parts), value.detach()

    def descend(
        self,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Any, Tensor], Tensor],
        lr: float,
        decay: float,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> Tensor:
        """``w <- (1 - lr decay) w - lr grad`` on the resident vector, without a flat gradient; returns the loss ().

        The batch cannot be looked at ``again`` afterwards: what its masks were drawn from is not kept.
        """
        self._mask_state = None
        value = self._loss(self.w, x, y, loss, forward)
        grads = self._gradients(value)
        if decay:
            self.w.mul_(1 - lr * decay)
        torch._foreach_add_(self._views, grads, alpha=-lr)
        return value.detach()

    def _loss(
        self,
        w: Tensor,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Any, Tensor], Tensor],
        forward: Callable[[nn.Module, Tensor], Any] | None,
        count: bool = True,
    ) -> Tensor:
        """Loss () of one batch at ``w``, with its graph; ``count``: it enters the running statistics."""
        if w is not self._bound:
            self.bind(w)
        for m in self._stats:
            m.track_running_stats = count
        if self.autocast is None:
            return loss(self.module(x) if forward is None else forward(self.module, x), y)
        with torch.autocast(self.w.device.type, self.autocast):
            return loss(self.module(x) if forward is None else forward(self.module, x), y)

    def _gradients(self, value: Tensor) -> tuple[Tensor, ...]:
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
        found = _backward((value,), (one,), False, False, self._inputs, True, accumulate_grad=False)
        grads: tuple[Tensor | None, ...] = found
        for g in grads:
            if g is None:  # a parameter without part in the loss
                pairs = zip(self._inputs, grads, strict=True)
                return tuple(torch.zeros_like(p) if g is None else g for p, g in pairs)
        return found

    def apply(self, w: Tensor, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """``call(module, x)`` at ``w``, without gradient; statistics stay as they are."""
        self.bind(w)
        for m in self._stats:
            m.track_running_stats = False
        with torch.no_grad():
            return call(self.module, x)

    def collect_statistics(self, batches: Iterable[Tensor]) -> None:
        """Replace the BatchNorm statistics by plain means over ``batches`` (B, ...) at the present weights."""
        momenta = [m.momentum for m in self._stats]
        for m in self._stats:
            m.reset_running_stats()
            m.momentum, m.track_running_stats = None, True  # None: the mean over all batches
        try:
            with torch.no_grad():
                for x in batches:
                    self.module(x)
        finally:
            for m, momentum in zip(self._stats, momenta, strict=True):
                m.momentum = momentum

    def state_dict(self, weights: Weights) -> dict[str, Tensor]:
        """A full state dict (frozen parameters and counters included) holding ``weights``; copies."""
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        held = self.layout.named(weights.w) | self.layout.named_buffers(weights.buffers)
        new = {
            id(own[name]): value for name, value in held.items()
        }  # by identity: tied tensors have several names
        saved = self.module.state_dict(keep_vars=True)
        return {k: new.get(id(v), v).detach().clone() for k, v in saved.items()}


def _template(layout: Layout, like: Tensor) -> tuple[list[Tensor], list[int]]:
    """What a gradient is put together from, with the zeros of its padding, and where each parameter's part goes."""
    parts, at, ends = list[Tensor](), list[int](), [*(s.offset for s in layout.params), layout.dim][1:]
    for slot, end in zip(layout.params, ends, strict=True):
        at.append(len(parts))
        parts.append(like)  # stands for the gradient
        if end > slot.span.stop:
            parts.append(like.new_zeros(end - slot.span.stop))
    return parts, at


def finite(t: Tensor) -> bool:
    """Whether all entries are finite, in one pass without a temporary."""
    if t.is_complex():
        t = torch.view_as_real(t)
    if not t.is_floating_point():
        return True
    return math.isfinite(t.sum(dtype=torch.float32 if t.dtype == torch.float16 else None).item())
