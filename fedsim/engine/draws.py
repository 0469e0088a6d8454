"""Whether code of a run may draw from the global generators of NumPy or Python, which then have to be seeded for each
client. The simulator's own code and torch's never do, so nobody pays for it unless code of others takes part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from inspect import getclosurevars
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn

from fedsim.engine.assignments import Plan

OURS = frozenset(
    {"fedsim", "clients", "strategies", "torch", "torchmetrics", "builtins"}
)  # packages whose code is known
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def ours(thing: object) -> bool:
    """Whether a class or function is the simulator's own or torch's."""
    return str(getattr(thing, "__module__", None) or "").partition(".")[0] in OURS


def may_draw(plan: Plan) -> bool:
    """Whether client, model, loss, metrics, augmentation or views hold code neither the simulator's nor torch's."""
    task = plan.task
    dataset = plan.data.dataset
    own = [
        plan.client,
        task.model,
        task.loss,
        task.forward,
        task.metrics,
        dataset.augment,
        *plan.views.values(),
    ]
    return not dataset.train.sliceable or not _known(own, set())


def theirs(thing: object) -> bool:
    """Whether ``thing`` is, or holds, code neither the simulator's nor torch's."""
    return not _known(thing, set())


def _known(thing: Any, seen: set[int]) -> bool:
    """Whether all code that ``thing`` is, or holds, is ours."""
    if id(thing) in seen:
        return True
    seen.add(id(thing))
    if isinstance(thing, partial):
        return _all_known([thing.func, thing.args, thing.keywords], seen)
    if isinstance(thing, MethodType):
        return _all_known([thing.__func__, thing.__self__], seen)
    if isinstance(thing, FunctionType):
        return ours(thing) and _all_known(getclosurevars(thing).nonlocals.values(), seen)
    if isinstance(thing, type | BuiltinFunctionType):
        return ours(thing)
    if isinstance(thing, Mapping):
        return _all_known(thing.values(), seen)
    if isinstance(thing, list | tuple | set | frozenset):
        return _all_known(thing, seen)
    if isinstance(thing, nn.Module):
        return all(_plain_module(m, seen) for m in thing.modules())
    return (not callable(thing) and not hasattr(thing, "__dict__")) or (
        ours(type(thing)) and _all_known(getattr(thing, "__dict__", {}).values(), seen)
    )


def _plain_module(module: nn.Module, seen: set[int]) -> bool:
    """Whether a module (without those in it) is of our classes, and nobody hung code of his own on it."""
    if not ours(type(module)) or any(getattr(module, name, None) for name in HOOKS):
        return False
    held = {k: v for k, v in vars(module).items() if callable(v) and not isinstance(v, nn.Module)}
    return _all_known(held.values(), seen)


def _all_known(things: Iterable[Any], seen: set[int]) -> bool:
    return all(_known(thing, seen) for thing in things)
