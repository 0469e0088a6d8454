"""The local optimiser: what a gradient becomes before it moves the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsim.config.schema import AdamConfig, ClientConfig
from fedsim.errors import ClientError, ConfigError
from fedsim.local.groups import Groups, other_rates
from fedsim.local.pace import Pace, Sums
from fedsim.local.rates import RateSchedule, round_lr
from fedsim.task.layout import Layout


class LocalSteps:
    """SGD with weight decay, clipping and momentum, or Adam, as configured; anew every round.

    ``steps(w, g)`` makes one step. ``lr`` is the learning rate of ``round``; ``momentum`` (..., d) is ``None`` before
    the first step with momentum; ``idle`` says where parameters lie that had no part in the last loss; ``clipped``
    counts the steps that were clipped, (C, 1) when C clients step at once. ``pace`` says where the client stands in its
    round, where a schedule or accumulation must know.
    """

    def __init__(
        self, local: ClientConfig, round: int, layout: Layout | None = None, pace: Pace | None = None
    ):
        """``layout`` of the vectors, for ``client.groups``; ``pace`` that of the job's other optimisers."""
        self.local, self.round = local, round
        self.lr = round_lr(local, round)
        self.groups = Groups.of(local.groups, layout, local.weight_decay) if local.groups else None
        self.schedule = RateSchedule.of(local.schedule, "client.schedule") if local.schedule else None
        paced = local.accumulate > 1 or self.schedule is not None
        self.pace = Pace() if pace is None and paced else pace
        self.paces: list[Pace] | None = None  # of several clients that step at once
        # whether a step goes along the clipped gradient itself
        self._straight = not (local.clip == "full" or local.momentum or local.adam or self.groups)
        # whether a step is w <- (1 - lr weight_decay) w - lr g
        self.plain = not (local.clip_norm is not None or local.momentum or local.adam or self.groups or paced)
        # whether ``fedsim.local.along`` can make it
        self.apart = not (local.clip == "full" or local.adam or self.groups or local.accumulate > 1)
        self.restart()

    def restart(self) -> None:
        """At rest, as before the first step: for a second phase of local training."""
        self.momentum: Tensor | None = None
        self.moments: tuple[Tensor, Tensor] | None = None  # Adam's
        self.adam_steps = 0
        self.idle: tuple[slice, ...] = ()
        self.clipped: int | Tensor = 0
        self.near = False  # whether the last step along single gradients was clipped, so that the next may be
        self._skipped: Tensor | None = None  # (d,) Adam's steps that passed a parameter by
        self._spans: Sequence[slice] | None = None  # where the next step's vectors lie, if not whole
        self._sums = Sums() if self.local.accumulate > 1 else None  # of the step's micro-batches so far

    def __call__(self, w: Tensor, g: Tensor, correction: Tensor | None = None, decay: float = 0.0) -> Tensor:
        """One local step in place: ``w <- w - lr (v + (weight_decay + decay) w)`` with ``v = clip(g + correction)``.

        ``g`` is consumed. Clipping bounds the norm over the whole vector, ``v min(1, G / (|v| + 1e-6))``, and leaves
        the decay terms outside (``clip: direction``); ``loss`` clips ``g`` alone, ``full`` the whole step. With
        momentum ``m <- momentum m + step`` and ``w <- w - lr m`` (``nesterov``: ``w - lr (step + momentum m)``),
        starting at zero every round. With ``client.adam`` the whole step, decay terms included, is what Adam takes for
        the gradient. ``decoupled``: ``w`` first shrinks by ``lr weight_decay w``, which is then no part of the step.

        ``client.groups`` multiply lr and replace weight_decay per entry; ``client.schedule`` multiplies lr per step.
        With ``client.accumulate`` ``w`` stays until the last micro-batch of a step, whose ``g`` is the samples' mean.

        Parameters without part in the loss (``idle``) do not decay by ``weight_decay``, as torch's optimisers pass by
        those without gradient; nothing moves them unless ``correction`` or ``decay`` does.
        """
        if self._sums is not None and self.pace is not None:
            mean = self._sums.add(g, self.idle, self.pace)
            if mean is None:
                return w
            g, self.idle = mean
        if self.idle:
            return self._sparing(w, g, correction, decay)
        return self._step(w, g, correction, decay)

    def _step(self, w: Tensor, g: Tensor, correction: Tensor | None, decay: float) -> Tensor:
        """A step along the gradient ``g`` of all its samples, none of the parameters idle."""
        local, scale = self.local, None
        lr: float | Tensor = self.lr
        own: float | Tensor = local.weight_decay
        if self.schedule is not None:
            lr = self._scheduled(w)
        if self.groups is not None:
            scale, own, frozen = self.groups.rates(w, self._spans)
            self._spans = None
            if frozen is not None:
                g.masked_fill_(frozen, 0)
        if local.clip == "loss":
            self._clip(g)
        if correction is not None:
            g.add_(correction)
        if local.clip == "direction":
            self._clip(g)
        if not self._straight or isinstance(lr, Tensor):
            g = self._direction(w, g, lr, scale, own, decay)
        elif own + decay:
            w.mul_(1 - lr * (own + decay))
        return _moved(w, g, lr, scale)

    def _direction(
        self,
        w: Tensor,
        g: Tensor,
        lr: float | Tensor,
        scale: Tensor | None,
        own: float | Tensor,
        decay: float,
    ) -> Tensor:
        """What is subtracted, times lr, in a step along ``g``: decay terms, clipping, momentum, Adam; it decays ``w``
        where that is decoupled."""
        local = self.local
        rate = decay if local.decoupled else own + decay
        if isinstance(rate, Tensor):
            g.addcmul_(w, rate)
        elif rate:
            g.add_(w, alpha=rate)
        if local.decoupled and (isinstance(own, Tensor) or own):
            w.mul_(1 - (lr if scale is None else lr * scale) * own)
        if local.clip == "full":
            self._clip(g)
        if local.momentum:
            step = g.clone() if local.nesterov else g
            self.momentum = step if self.momentum is None else self.momentum.mul_(local.momentum).add_(g)
            g = g.add_(self.momentum, alpha=local.momentum) if local.nesterov else self.momentum
        return self._adam(g, local.adam) if local.adam else g

    def pulled(self, w: Tensor, g: Tensor, fixed: Tensor, strength: float, *, whole: bool = False) -> Tensor:
        """One local step along ``g + strength w + fixed``, the last two a pull to a point such as ``mu (w - x^t)``.

        ``clip: direction`` bounds that sum. Under ``clip_pull: split``, unless the pull must stay ``whole``, it bounds
        ``g + fixed``, and ``strength w`` acts beside the weight decay: weights longer than ``clip_norm / strength``
        then shrink, whatever they are pulled to.
        """
        local = self.local
        if local.clip_norm is None or local.clip != "direction" or (local.clip_pull == "split" and not whole):
            return self(w, g, correction=fixed, decay=strength)
        return self(w, g, correction=torch.add(fixed, w, alpha=strength))

    def _sparing(self, w: Tensor, g: Tensor, correction: Tensor | None, decay: float) -> Tensor:
        """A step where parameters are ``idle``: weights of zero do not decay, and are put back afterwards."""
        idle, self.idle = self.idle, ()
        before, alone = [w[..., s].clone() for s in idle], correction is None and not decay
        held = [] if not alone else [t for t in (self.momentum, *(self.moments or ())) if t is not None]
        kept = [(t[..., s], t[..., s].clone()) for t in held for s in idle]
        if decay:
            correction = torch.zeros_like(g) if correction is None else correction.clone()
        for span in idle:
            if decay and correction is not None:
                correction[..., span].add_(w[..., span], alpha=decay)
            w[..., span] = 0
        w = self._step(w, g, correction, decay)
        for span, value in zip(idle, before, strict=True):
            w[..., span] = value if alone else w[..., span] + value
        for place, value in kept:
            place.copy_(value)
        if alone and self.local.adam:
            if self._skipped is None:
                self._skipped = torch.zeros_like(w)
            for span in idle:
                self._skipped[span] += 1
        return w

    def cut(self, spans: Sequence[slice]) -> None:
        """The next step is one of the parts ``spans`` of the vectors alone, laid end to end."""
        places, start = list[slice](), 0
        for span in spans if self.idle else ():
            for s in self.idle:
                a, b = max(s.start, span.start), min(s.stop, span.stop)
                if a < b:
                    places.append(slice(start + a - span.start, start + b - span.start))
            start += span.stop - span.start
        self.idle, self._spans = tuple(places), spans

    def demand_gradient_steps(self, who: str) -> None:
        """For rules that read gradients back from ``(x - x_K) / (K lr)``.

        Raises:
            ClientError: under whatever makes a step another thing than lr times a gradient, or a sum of such.
        """
        remedy = unlike_gradients(self.local)
        if not remedy and not self.lr:
            remedy = "the learning rate of this round is 0; give client.round_schedule a floor"
        if remedy:
            raise ClientError(f"{who} reads gradients back from the local steps; {remedy}")

    def of_many(self, others: Sequence[LocalSteps]) -> LocalSteps:
        """That of several clients that step at once, from their own."""
        whole = copy.copy(self)
        if self.schedule is not None:
            whole.paces = [one.pace for one in others if one.pace is not None]
        return whole

    def rows(self, index: Tensor) -> LocalSteps:
        """Those of some of the clients that step at once, by position (c,)."""
        part = copy.copy(self)
        part.momentum = None if self.momentum is None else self.momentum[index]
        part.clipped = self.clipped[index] if isinstance(self.clipped, Tensor) else self.clipped
        part.paces = None if self.paces is None else [self.paces[i] for i in index.tolist()]
        return part

    def put_back(self, index: Tensor, part: LocalSteps, count: int) -> None:
        """Take over what has become of ``part``, the ``rows(index)`` of ``count`` clients."""
        if part.momentum is not None:
            if self.momentum is None:
                self.momentum = part.momentum.new_zeros((count, part.momentum.shape[-1]))
            self.momentum[index] = part.momentum
        if isinstance(part.clipped, Tensor):
            if not isinstance(self.clipped, Tensor):
                self.clipped = part.clipped.new_zeros((count, 1))
            self.clipped[index] = part.clipped

    @property
    def rate(self) -> float:
        """The learning rate of this step of one client."""
        return (
            self.lr
            if self.schedule is None or self.pace is None
            else self.lr * self.pace.factor(self.schedule)
        )

    def _scheduled(self, w: Tensor) -> float | Tensor:
        """The learning rate of this step; (C, 1) where each of C clients has its own number of steps."""
        if self.paces is None:
            return self.rate
        assert self.schedule is not None
        return w.new_tensor([self.lr * pace.factor(self.schedule) for pace in self.paces]).unsqueeze(-1)

    def _adam(self, g: Tensor, adam: AdamConfig) -> Tensor:
        """Adam's direction (d,) for the gradient ``g``; moments are this job's own."""
        m, v = self.moments if self.moments is not None else (torch.zeros_like(g), torch.zeros_like(g))
        m, v = m.lerp_(g, 1 - adam.beta1), v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
        self.moments, self.adam_steps = (m, v), self.adam_steps + 1
        t: Any = self.adam_steps if self._skipped is None else (self.adam_steps - self._skipped).clamp_(min=1)
        root = (v / (1 - adam.beta2**t)).sqrt_().add_(adam.eps)
        return m.div(root).div_(1 - adam.beta1**t)

    def _clip(self, g: Tensor) -> None:
        bound = self.local.clip_norm
        if bound is None:
            return
        norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-6
        if g.dim() > 1 or not g.is_cpu:  # no wait for a GPU
            self.clipped = self.clipped + (norm > bound).long()
            g.mul_((bound / norm).clamp(max=1.0))
        elif float(norm) > bound:
            self.clipped += 1
            g.mul_(bound / norm)


def _moved(w: Tensor, g: Tensor, lr: float | Tensor, scale: Tensor | None) -> Tensor:
    """``w - lr scale g`` in place; ``g`` is left as it is, since it may be the momentum."""
    if isinstance(lr, Tensor):
        return w.addcmul_(g, lr if scale is None else lr * scale, value=-1)
    return w.add_(g, alpha=-lr) if scale is None else w.addcmul_(g, scale, value=-lr)


@runtime_checkable
class ReadsGradients(Protocol):
    """A client whose updates are gradients only if each local step is the rate times a gradient, or a sum of such."""

    @property
    def reads_gradients(self) -> str:
        """What of it, in words; empty: nothing."""


def unlike_gradients(local: ClientConfig) -> str:
    """What to type so that steps are the rate times a gradient; empty if they are."""
    pattern = other_rates(local.groups)
    for found, remedy in (
        (local.adam, "use client=sgd instead of adam"),
        (local.nesterov, "leave client.nesterov out"),
        (
            local.schedule and not local.schedule.constant,
            "leave client.schedule out (client.round_schedule may stay)",
        ),
        (pattern, f"client.groups must not give '{pattern}' another lr"),
    ):
        if found:
            return remedy
    return ""


def check_gradient_steps(client: object, local: ClientConfig) -> None:
    """ConfigError, with what to type, if ``client`` reads gradients back from steps that are none."""
    if isinstance(client, ReadsGradients) and client.reads_gradients and (remedy := unlike_gradients(local)):
        raise ConfigError(f"{client.reads_gradients} reads gradients back from the local steps; {remedy}")
