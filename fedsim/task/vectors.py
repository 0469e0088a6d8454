"""Flat vectors: all trainable parameters of a model as one tensor ``(d,)``, all statistics as another ``(b,)``."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.errors import ClientError
from fedsim.rng import hash_tensors, layer_state, set_layer_state
from fedsim.task.fixed import converted
from fedsim.task.gradients import Gradients
from fedsim.task.habits import UNKNOWN, Habits
from fedsim.task.installed import Installed, on_copies
from fedsim.task.layout import Layout
from fedsim.task.losses import Forward, LossFn
from fedsim.task.remembered import Remembered
from fedsim.task.running import collect, collecting

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

    apart: ClassVar[bool] = True  # whether steps go parameter by parameter where they can

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        aligned: bool = True,
        habits: Habits = UNKNOWN,
        loss: object = None,
        reached: bool = False,
    ):
        """``aligned=False``: vectors without padding (see ``Layout``); ``habits``: what the model was seen to do;
        ``loss``: what may keep a state as the model's layers may; ``reached``: whether code of the user's may change
        any layer."""
        self.module = converted(model, dtype, device)
        if habits.overwrites:  # methods look at a batch several times
            model.register_forward_pre_hook(on_copies, prepend=True, with_kwargs=True)
        self.layout = layout = Layout(model, dtype, aligned=aligned)
        named = dict(model.named_parameters())
        self._params = [p for p in named.values() if p.requires_grad]
        self.w = layout.flatten(named, dtype)
        shapes = [torch.empty(s.shape, device="meta") for s in layout.params]
        self._places = [(t.shape, t.stride(), s.offset) for t, s in zip(shapes, layout.params, strict=True)]
        self.buffers = torch.zeros(layout.buffer_dim, dtype=dtype, device=device)
        self._installed = Installed(model, layout, self.buffers, habits)
        self._initial_buffers = self.buffers.clone()
        flat = {slot.name for slot in layout.buffers}
        self._remembered = Remembered(model, self.buffers, flat, habits, loss, reached)
        self.reached = self._remembered.reached
        self._stats = collecting(model)
        self.draws = any(isinstance(m, DROPOUT) for m in model.modules())
        self.iterates = self._remembered.iterates  # power iteration moves what is not averaged
        self._mask_state: list[Tensor] | None = None
        self._used = False  # since everything was as at first
        self._loaded = (-1, 0)  # version of ``w`` after ``load``, and which vector that was
        self._differs = -1  # version of ``w`` after ``minus``
        self.autocast: torch.dtype | None = None  # mixed precision of forward passes while training
        self._bound: Tensor | None = None
        self.bind(self.w)
        self.views = [p.data for p in self._params]  # of the resident vector, a tensor for each parameter
        self._installed.settle(self._params)
        self.backward = Gradients(layout, self.w, self._params)

    @property
    def idle(self) -> tuple[slice, ...]:
        """Where parameters lie that had no part in the last loss: no step moves them, nor do they decay."""
        return self.backward.idle

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
        if self._installed.writes and w is not self.w:
            w = w.clone()  # it is somebody else's
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

        What layers remember (counters, attributes), and without ``buffers`` the statistics too, goes back to its
        initial values; spectral norms follow ``w``.
        """
        self.bind(self.w)
        self.w.copy_(w)
        self._loaded = self.w._version, id(w)
        if self.layout.buffer_dim:
            self.buffers.copy_(self._initial_buffers if buffers is None else buffers)
        if self._used or self.iterates:
            self.forget()
        self._remembered.settle()
        return self.w

    def minus(self, w: Tensor, anchor: Tensor) -> Tensor:
        """``w - anchor`` (d,), in place."""
        # steps along ``views`` do not count: there is no padding in them
        alike = w is self.w and (w._version, id(anchor)) == self._loaded
        w.sub_(anchor)
        self._differs = w._version if alike else -1
        return w

    def pads_with_zeros(self, v: Tensor) -> bool:
        """Whether ``v`` is the resident vector as ``minus`` left it, less what was loaded: zero padding, known."""
        return v._version == self._differs and v.data_ptr() == self.w.data_ptr() and v.shape == self.w.shape

    def scaled(self) -> None:
        """Say that what ``pads_with_zeros`` was true of has been multiplied in place by a finite number."""
        self._differs = self.w._version

    def forget(self) -> None:
        """As if nobody had used the model before; the vectors stay as they are."""
        self._mask_state, self._used = None, False
        self._remembered.restore()

    def check(self) -> None:
        """After a client's work: ClientError names what lies no longer where it is trained."""
        if self._bound is self.w and (self.reached or not self._installed.common):
            self._installed.check()

    def repair(self) -> None:
        """After an error: everything in its place again."""
        self._bound = None
        self._installed.put_back()
        self.forget()

    def grad(
        self,
        w: Tensor,
        x: Tensor,
        y: Tensor,
        loss: LossFn,
        *,
        again: bool = False,
        forward: Forward | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient (d,) and loss () of one batch at ``w``; a fresh tensor each time.

        ``forward(module, x)`` replaces ``module(x)``. ``again=True`` is a second look at the same batch: dropout masks
        are those of the first, and running statistics are not updated twice.
        """
        # whatever the layers: masks are also drawn by functions (F.dropout, attention), unseen from here
        if not again:
            self._mask_state = layer_state(self.w.device)
        elif self._mask_state is not None:
            set_layer_state(self._mask_state, self.w.device)
        value = self._loss(w, x, y, loss, forward, count=not again)
        return self.backward.joined(self.backward.of(value)), value.detach()

    def descend(
        self, x: Tensor, y: Tensor, loss: LossFn, lr: float, decay: float, forward: Forward | None = None
    ) -> Tensor:
        """``w <- (1 - lr decay) w - lr grad`` on the resident vector, without a flat gradient; returns the loss ().

        The batch cannot be looked at ``again`` afterwards: what its masks were drawn from is not kept.
        """
        self._mask_state = None
        value = self._loss(self.w, x, y, loss, forward)
        grads = self.backward.of(value)
        if decay:
            kept = [(span, self.w[span].clone()) for span in self.idle]
            self.w.mul_(1 - lr * decay)
            for span, before in kept:
                self.w[span] = before
        torch._foreach_add_(self.views, grads, alpha=-lr)
        return value.detach()

    def gradients(
        self, x: Tensor, y: Tensor, loss: LossFn, forward: Forward | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of one batch at the resident vector, one for each of ``views``, to be read only; and the loss ().

        As after ``descend``, the batch cannot be looked at ``again``.
        """
        self._mask_state = None
        value = self._loss(self.w, x, y, loss, forward)
        return self.backward.of(value), value.detach()

    def views_of(self, v: Tensor) -> list[Tensor]:
        """Views of a contiguous ``v`` (d,), a tensor for each parameter."""
        start = v.storage_offset()
        return [v.as_strided(shape, stride, start + offset) for shape, stride, offset in self._places]

    def _loss(
        self, w: Tensor, x: Tensor, y: Tensor, loss: LossFn, forward: Forward | None, count: bool = True
    ) -> Tensor:
        """Loss () of one batch at ``w``, with its graph; ``count``: it enters the running statistics."""
        self._used = True
        if w is not self._bound:
            self.bind(w)
        for m in self._stats:
            m.track_running_stats = count
        if self.autocast is None:
            value = loss(self.module(x) if forward is None else forward(self.module, x), y)
        else:
            with torch.autocast(self.w.device.type, self.autocast):
                value = loss(self.module(x) if forward is None else forward(self.module, x), y)
        if self._installed.moves:
            self._bound = self._installed.reinstall(self._bound, self.w)
        return value

    def apply(self, w: Tensor, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """``call(module, x)`` at ``w``, without gradient; statistics stay as they are."""
        self._used = True
        self.bind(w.clone() if self._installed.writes else w)
        for m in self._stats:
            m.track_running_stats = False
        with torch.no_grad():
            return call(self.module, x)

    @property
    def settled(self) -> bool:
        """Whether evaluation needs nothing but ``w``, so that it may change between two passes of one ``measuring``."""
        return not (self.iterates or self._installed.writes)

    @contextmanager
    def measuring(self, w: Tensor) -> Iterator[Callable[[], None]]:
        """``module`` at ``w`` (d,) in evaluation mode, without gradients; afterwards all is as before.

        Gives what is to be called before each batch, so that none sees what another one left in the model.
        """
        self.bind(w.clone() if self._installed.writes else w)
        try:
            with self._remembered.evaluation() as again:
                yield again
            if w is self.w and not self._installed.writes:
                self._installed.check()
        finally:
            if self._installed.writes:
                self._bound = None
            self.bind(self.w)

    def collect_statistics(self, batches: Iterable[Tensor]) -> None:
        """Replace the BatchNorm statistics by plain means over ``batches`` (B, ...) at the present weights."""
        self._used = True
        collect(self._stats, self.module, batches)

    def state_dict(self, weights: Weights, without: Container[str] = ()) -> dict[str, Tensor]:
        """A full state dict (frozen parameters and counters included, but not the names ``without``) holding
        ``weights``; copies.

        Extra states that are no tensors are left out: what they hold stays as the model was handed over. Where spectral
        norms follow the weights, ``weights`` are loaded first.
        """
        if self.iterates:
            self.load(*weights)
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        held = self.layout.named(weights.w) | self.layout.named_buffers(weights.buffers)
        # by identity: tied tensors have several names
        new = {id(own[name]): value for name, value in held.items()}
        saved = self.module.state_dict(keep_vars=True)
        kept = {k: v for k, v in saved.items() if isinstance(v, Tensor) and k not in without}
        return {k: new.get(id(v), v).detach().clone() for k, v in kept.items()}
