"""Gradients on a GPU as captured graphs: one launch instead of a hundred, the same kernels and so the same bits."""

from __future__ import annotations

import pickle
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.rng import layer_state, set_layer_state
from fedsim.task.losses import Forward, LossFn
from fedsim.task.vectors import FlatModel

OFTEN, MOST = 2, 16  # times that a shape comes before it is captured; graphs of one computation

Compute = Callable[..., tuple[Tensor, ...]]


class Captured:
    """``compute(*tensors) -> tensors``, replayed from CUDA graphs: one for each shape of its arguments.

    A graph is kept only if its first replay gives the bits that ``compute`` gave; what cannot be captured (a wait for
    the GPU, a draw from a generator of the host) is computed as before. So nothing but the speed depends on it.
    """

    def __init__(self, compute: Compute, moved: Sequence[Tensor] = ()):
        """``moved``: what ``compute`` changes in place, such as running statistics."""
        self._compute, self._moved = compute, list(moved)
        self._graphs: dict[Any, _Graph | None] = {}
        self._seen = Counter[Any]()

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        """What ``compute`` gives. It may lie in memory that the next call overwrites."""
        key = tuple((a.shape, a.dtype) for a in args)
        if key not in self._graphs:
            self._seen[key] += 1
            if not args[0].is_cuda or self._seen[key] <= OFTEN or len(self._graphs) >= MOST:
                return self._compute(*args)
            self._graphs[key] = _captured(self._compute, args, self._moved)
        graph = self._graphs[key]
        return self._compute(*args) if graph is None else graph(*args)


class _Graph:
    """A captured computation with the memory that its arguments are copied to."""

    def __init__(self, graph: Any, inputs: Sequence[Tensor], outputs: tuple[Tensor, ...]):
        self.graph, self.inputs, self.outputs = graph, inputs, outputs

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        for here, given in zip(self.inputs, args, strict=True):
            here.copy_(given)
        self.graph.replay()
        return self.outputs


def _captured(compute: Compute, args: Sequence[Tensor], moved: Sequence[Tensor]) -> _Graph | None:
    """A graph of ``compute`` for arguments like ``args``; ``None`` where there can be none. Leaves no trace."""
    inputs, device = [a.detach().clone() for a in args], args[0].device
    before, masks, host = [t.clone() for t in moved], layer_state(device), _host_state()

    def back() -> None:
        for t, value in zip(moved, before, strict=True):
            t.copy_(value)
        set_layer_state(masks, device)

    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        expected = [t.clone() for t in (*compute(*inputs), *moved)]
        drawn = _host_state() != host
        back()
        if drawn or not _runs_on(compute, inputs):
            back()
            return None
        back()
        torch.cuda.synchronize(device)
        graph = _graph_of(compute, inputs)
        back()
        if graph is not None:
            found = [*graph(*inputs), *moved]
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                graph = None
        back()
    torch.cuda.synchronize(device)
    return graph


def _graph_of(compute: Compute, inputs: Sequence[Tensor]) -> _Graph | None:
    graph, outputs = torch.cuda.CUDAGraph(), tuple[Tensor, ...]()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        try:
            outputs = tuple(compute(*inputs))
        finally:
            graph.capture_end()
    except Exception as e:
        warnings.warn(
            f"a step could not be captured as a CUDA graph and is launched as it is ({e})", stacklevel=2
        )
        return None
    return _Graph(graph, inputs, outputs)


def _runs_on(compute: Compute, inputs: Sequence[Tensor]) -> bool:
    """Whether ``compute`` never waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(*inputs)
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return True


def _host_state() -> tuple[Any, ...]:
    """State of the generators of the host: a graph would repeat what was drawn from them."""
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(np.random.get_state()), random.getstate()


class CapturedModel(FlatModel):
    """A resident model on a GPU. With ``capture`` its gradients come from graphs where they are those of the task's own
    loss at the resident vector; all others, and all without it, are launched as they are.

    Its steps move the vector as a whole (on a CPU they go tensor by tensor): the same with and without graphs.
    """

    apart = False

    def capture(self, loss: Callable[[Any, Any], Tensor]) -> None:
        """Capture gradients of ``loss``, for a model that computes and remembers nothing."""
        self._own = loss
        moved = [self.buffers, *self._remembered.small]
        self._steps = {count: Captured(partial(self._flat, count), moved) for count in (True, False)}
        self._moves = {
            decays: Captured(partial(self._move, decays), [self.w, *moved]) for decays in (True, False)
        }

    _own: Callable[[Any, Any], Tensor] | None = None
    _steps: dict[bool, Captured]
    _moves: dict[bool, Captured]
    _scales: tuple[Tensor, Tensor] | None = None  # lr and 1 - lr decay of plain steps, where graphs read them
    _rates: tuple[float, float] | None = None  # what they hold

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
        """See ``FlatModel.grad``."""
        if w is not self.w or loss is not self._own or forward is not None or not _plain(x, y):
            return super().grad(w, x, y, loss, again=again, forward=forward)
        if not again:
            self._mask_state = layer_state(w.device)
        elif self._mask_state is not None:
            set_layer_state(self._mask_state, w.device)
        g, value = self._replayed(not again, x, y)
        return g.clone(), value.clone()

    def descend(
        self, x: Tensor, y: Tensor, loss: LossFn, lr: float, decay: float, forward: Forward | None = None
    ) -> Tensor:
        """See ``FlatModel.descend``."""
        self._mask_state = None
        if self._rates != (lr, decay):
            if self._scales is None:
                self._scales = self.w.new_zeros(()), self.w.new_zeros(())
            for there, number in zip(self._scales, (lr, 1 - lr * decay), strict=True):
                there.fill_(number)
            self._rates = lr, decay
        if loss is self._own and forward is None and _plain(x, y):
            self._used, self.backward.idle = True, ()
            (value,) = self._moves[decay != 0](x, y)
            return value.clone()
        value = self._loss(self.w, x, y, loss, forward)
        g = self.backward.joined(self.backward.of(value))
        kept = [(span, self.w[span].clone()) for span in self.idle] if decay else []
        self._moved(g, decay != 0)
        for span, before in kept:
            self.w[span] = before
        return value.detach()

    def _move(self, decays: bool, x: Tensor, y: Tensor) -> tuple[Tensor]:
        """A plain step of the resident vector; its loss ()."""
        g, value = self._flat(True, x, y)
        self._moved(g, decays)
        return (value,)

    def _moved(self, g: Tensor, decays: bool) -> None:
        assert self._scales is not None
        lr, keep = self._scales
        if decays:
            self.w.mul_(keep)
        self.w.addcmul_(g, lr, value=-1)

    def _replayed(self, count: bool, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._used, self.backward.idle = True, ()
        g, value = self._steps[count](x, y)
        return g, value

    def _flat(self, count: bool, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Flat gradient (d,) and loss () of a batch at the resident vector."""
        assert self._own is not None
        value = self._loss(self.w, x, y, self._own, None, count)
        return self.backward.joined(self.backward.of(value)), value.detach()


def _plain(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor)


@contextmanager
def exact(tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions on a GPU in float32 (or, with ``tf32``, with inputs rounded to 10 bits), by
    kernels that repeat their bits; torch's switches are put back afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer names for the same switches
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, tf32, tf32
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
