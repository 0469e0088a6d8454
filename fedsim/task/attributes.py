"""Plain attributes of layers: a hidden state, a cache, a counter, a queue. Noted once, compared and put back often."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.config.usermodules import is_users
from fedsim.task.mapped import LARGE, clones

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
LEFT_ALONE: tuple[type, ...] = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    ModuleType,
    Enum,
    logging.Logger,
)
LEFT_ALONE += (*FUNCTIONS, torch.dtype, torch.device, torch.Size)
COMMON = ("torch.nn.modules.", "fedsim.models.")
HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"})
STANDARD = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"} - HOOKS
LONG = 1000  # entries of a container beyond which only its length is looked at
MOST = 10_000  # objects looked into


class Attributes:
    """The attributes of ``layers`` as they are now, with all that lists, dictionaries, tensors, random generators and
    objects among them hold, and what ``things`` hold. Registered tensors and modules are compared by identity, not by
    content.

    What no Python object shows stays unseen: variables of functions and of classes, iterators.
    """

    def __init__(
        self, layers: Iterable[nn.Module], registered: Iterable[object], things: Iterable[object] = ()
    ):
        self._live: list[Iterable[Any]] = []  # views of containers
        self._noted: list[Any] = []  # what they held, end to end
        self._contents: list[tuple[Any, Any]] = []  # each container with a copy
        self._long: list[tuple[Any, int]] = []
        self._tensors: list[Content] = []
        self._put_back: list[
            Callable[[], object]
        ] = []  # of arrays and random generators, too dear to compare
        self._seen = {id(thing) for thing in registered}
        for layer in layers:
            own = vars(layer)
            self._container(own, own.values())
            for name, value in own.items():
                if name not in STANDARD or value:
                    self._look(value)
        for thing in things:
            self._look(thing)
        self._seen.clear()

    def restore(self) -> None:
        """Put everything back as it was noted."""
        if not self.unchanged():
            for holder, content in self._contents:
                _fill(holder, content)
        for tensor in self._tensors:
            tensor.restore()
        for put in self._put_back:
            put()

    @property
    def comparable(self) -> bool:
        """Whether ``unchanged`` sees all there is: no tensors, arrays or random generators."""
        return not self._tensors and not self._put_back

    def unchanged(self) -> bool:
        """Whether all containers hold what they held; what tensors and the like hold is not looked at."""
        now: list[Any] = []
        try:
            for view in self._live:
                now += view
            return now == self._noted and all(len(holder) == n for holder, n in self._long)
        except Exception:  # tensors and arrays have no plain answer to ==, so they were replaced
            return False

    def same(self) -> bool:
        """Whether nothing was changed; random generators and arrays always may have been. Dear: for once."""
        return not self._put_back and self.unchanged() and all(t.equal() for t in self._tensors)

    def _look(self, thing: Any) -> None:
        if isinstance(thing, LEFT_ALONE) or id(thing) in self._seen or len(self._seen) > MOST:
            return
        self._seen.add(id(thing))
        if isinstance(thing, Tensor):
            if not thing.is_inference() and thing.layout == torch.strided:
                self._tensors.append(Content(thing))
        elif (put := _random_state(thing)) is not None:
            self._put_back.append(put)
        elif isinstance(thing, np.ndarray):
            if thing.flags.writeable and not thing.dtype.hasobject:
                held = thing.copy()
                self._put_back.append(lambda: np.copyto(thing, held))
        elif isinstance(thing, dict):
            self._container(thing, thing.values())
            self._look_into(thing.values())
        elif isinstance(thing, list | deque | set):
            self._container(thing, thing)
            self._look_into(thing)
        elif isinstance(thing, tuple | frozenset):
            self._look_into(thing)
        if isinstance(own := getattr(thing, "__dict__", None), dict):
            self._container(own, own.values())
            self._look_into(own.values())

    def _look_into(self, things: Iterable[Any]) -> None:
        things = list(things)
        for thing in things if len(things) <= LONG else ():
            self._look(thing)

    def _container(self, holder: Any, view: Any) -> None:
        if len(holder) > LONG:
            self._long.append((holder, len(holder)))
        else:
            self._live.append(view)
            self._noted += view
        self._contents.append((holder, holder.copy()))


class Content:
    """A tensor's numbers, and where they lie; of a large one, changed where torch counted a change in place."""

    def __init__(self, tensor: Tensor, held: Tensor | None = None):
        """``held``: a copy of it, if there is one."""
        self.tensor, self._alias = tensor, tensor.detach()
        self._held, self._version = clones([tensor])[0] if held is None else held, tensor._version

    @property
    def changed(self) -> bool:
        """Whether it was written to since it was noted or put back."""
        return self.tensor._version != self._version

    def equal(self) -> bool:
        """Whether it still holds the same, there."""
        return self.tensor.data_ptr() == self._alias.data_ptr() and torch.equal(self._alias, self._held)

    def restore(self) -> None:
        """Put them back, there."""
        t, alias = self.tensor, self._alias
        if t.data_ptr() != alias.data_ptr() or t.shape != alias.shape:
            t.data = alias
        if self.changed or t.numel() <= LARGE:
            alias.copy_(self._held)
            self._version = t._version


def _fill(holder: Any, content: Any) -> None:
    """Make a container hold ``content`` again, by the plain methods of its kind."""
    if isinstance(holder, OrderedDict):  # which has an order of its own beside that of dict
        OrderedDict.clear(holder)
        OrderedDict.update(holder, content)
    elif isinstance(holder, dict):
        dict.clear(holder)
        dict.update(holder, content)
    elif isinstance(holder, set):
        set.clear(holder)
        set.update(holder, content)
    elif isinstance(holder, list):
        list.__setitem__(holder, slice(None), content)
    else:
        holder.clear()
        holder.extend(content)


def _random_state(thing: Any) -> Callable[[], object] | None:
    """What sets a random generator back; ``None`` if it is none."""
    state: Any
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return lambda: thing.set_state(state)
    if isinstance(thing, random.Random):
        state = thing.getstate()
        return lambda: thing.setstate(state)
    if isinstance(thing, np.random.RandomState):
        state = thing.get_state()
        return lambda: thing.set_state(state)
    if isinstance(thing, np.random.Generator):
        bits, state = thing.bit_generator, thing.bit_generator.state
        return lambda: setattr(bits, "state", state)
    return None


def of_users(model: nn.Module) -> bool:
    """Whether code of the user's is part of ``model``, which may change layers of torch's too: their mode, their
    hooks, what a ``Sequential`` holds."""
    layers = list(model.modules())
    kinds = {type(m).__module__ for m in layers} | {_module_of(h) for m in layers for h in _hooks(m)}
    return any(map(is_users, kinds))


def own_layers(model: nn.Module, names: Iterable[str] = ()) -> list[nn.Module]:
    """Layers that may keep something in attributes: not torch's own, unless something is hooked onto them, or they
    are ``names``."""
    named = set(names)
    return [m for name, m in model.named_modules() if name in named or is_own(m)]


def is_own(layer: nn.Module) -> bool:
    """Whether a layer is not torch's own, or something is hooked onto it."""
    return any(True for _ in _hooks(layer)) or not type(layer).__module__.startswith("torch.")


def is_common(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's usual ones or ours, with nothing hooked onto it: its tensors stay in place."""
    return not any(True for _ in _hooks(layer)) and type(layer).__module__.startswith(COMMON)


def _hooks(layer: nn.Module) -> Iterator[Any]:
    for name in sorted(HOOKS):
        yield from getattr(layer, name).values()


def _module_of(hook: Any) -> str:
    inner = getattr(hook, "func", hook)  # of a partial
    return str(getattr(inner, "__module__", None) or type(inner).__module__)
