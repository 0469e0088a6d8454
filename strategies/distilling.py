"""A model trained at the server on batches of inputs and targets: one loop for every method that does so.

Its optimisers work on flat vectors and keep what they remember in tensors, which a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.task.losses import Forward
from fedsim.task.vectors import FlatModel

Loss = Callable[[Tensor, Tensor], Tensor]  # (the student's logits, targets) -> mean over the batch
TINY = 1e-6  # added to a length by which a gradient is divided
Step = Callable[[Tensor, Tensor], None]  # moves w (d,) in place along a gradient (d,)


def trained(
    student: FlatModel, batches: Iterable[tuple[Any, Tensor]], loss: Loss, step: Step, logits: Forward
) -> float:
    """Train the resident vector of ``student`` over ``batches`` of inputs and targets; the mean loss over them.

    ``logits(module, x)`` gives (B, C).
    """
    losses = []
    for x, target in batches:
        g, value = student.grad(student.w, x, target, loss, forward=logits)
        step(student.w, g)
        losses.append(value.double())
    return float(torch.stack(losses).mean()) if losses else float("nan")


def clipped(g: Tensor, bound: float | None) -> Tensor:
    """``g`` (d,), no longer than ``bound``: times ``min(1, bound / (|g| + 1e-6))``, as torch and local steps clip."""
    if bound is None:
        return g
    factor = bound / (float(g.norm()) + TINY)
    return g * factor if factor < 1 else g


@dataclass
class Momentum:
    """``v <- momentum v + (g + decay w)``, ``w <- w - lr v``; ``v`` (d,) is changed in place."""

    v: Tensor
    lr: float
    momentum: float = 0.0
    decay: float = 0.0
    bound: float | None = None  # on the length of g

    def __call__(self, w: Tensor, g: Tensor) -> None:
        """One step on ``w`` (d,), in place."""
        self.v.mul_(self.momentum).add_(clipped(g, self.bound)).add_(w, alpha=self.decay)
        w.sub_(self.v, alpha=self.lr)


@dataclass
class Adam:
    """Adam (Kingma, Ba 2015, Algorithm 1) with moments ``m``, ``v`` (d,), changed in place.

    ``rate(t)`` is the learning rate of step t, from 0; ``t`` counts the steps done.
    """

    m: Tensor
    v: Tensor
    rate: Callable[[int], float]
    t: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __call__(self, w: Tensor, g: Tensor) -> None:
        """One step on ``w`` (d,), in place."""
        lr, (b1, b2) = self.rate(self.t), self.betas
        self.t += 1
        self.m.mul_(b1).add_(g, alpha=1 - b1)
        self.v.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = (self.v / (1 - b2**self.t)).sqrt_().add_(self.eps)
        w.addcdiv_(self.m, denominator, value=-lr / (1 - b1**self.t))


def passes(n: int, size: int, rng: torch.Generator, smallest: int = 2) -> Iterator[Tensor]:
    """Positions of n samples in batches of ``size``, in random order, each once; a last batch with fewer than
    ``smallest`` is left out."""
    for rows in torch.split(torch.randperm(n, generator=rng), size):
        if len(rows) >= smallest:
            yield rows
