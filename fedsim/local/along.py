"""Local steps without a flat gradient: along the gradients of the parameters as they come out of autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.local.optimiser import LocalSteps
from fedsim.task.vectors import FlatModel

Grads = tuple[Tensor, ...] | list[Tensor]  # one for each parameter


def step(sgd: LocalSteps, model: FlatModel, grads: Grads) -> None:
    """The step ``sgd(model.w, g)``, to its bits, where ``g`` is there as ``grads``, a tensor for each parameter.

    For steps that are made ``apart``. Where the gradient is clipped or nearly so, or parameters are idle, it is put
    together as one vector after all: a norm's last bits depend on the order in which squares are added up.
    """
    local, w, views = sgd.local, model.w, model.views
    bound, own, sgd.idle = local.clip_norm, local.weight_decay, model.idle
    if sgd.idle or (bound is not None and (sgd.near or not model.backward.shorter(grads, bound))):
        before = sgd.clipped
        sgd(w, model.backward.joined(grads))
        sgd.near = bool(sgd.clipped != before)
        return
    lr = sgd.rate
    if own and local.momentum and not local.decoupled:
        grads = torch._foreach_add(grads, views, alpha=own)
    elif own:
        w.mul_(1 - lr * own)
    if local.momentum:
        m, speeds = _sped_up(sgd, model, grads)
        if not local.nesterov:
            w.add_(m, alpha=-lr)
            return
        grads = torch._foreach_add(grads, speeds, alpha=local.momentum)
    torch._foreach_add_(views, grads, alpha=-lr)


def _sped_up(sgd: LocalSteps, model: FlatModel, grads: Grads) -> tuple[Tensor, list[Tensor]]:
    """The momentum (d,) after a step along ``grads``, and its views."""
    if sgd.momentum is None:
        m = sgd.momentum = torch.zeros_like(model.w)
        speeds = model.views_of(m)
        torch._foreach_copy_(speeds, grads)
    else:
        m = sgd.momentum.mul_(sgd.local.momentum)
        speeds = model.views_of(m)
        torch._foreach_add_(speeds, grads)
    return m, speeds
