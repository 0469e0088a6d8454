"""Finds out whether a client's code keeps something outside its state: on ``self``, on its class, in a global.

In one process such things pass from client to client, on several workers they do not: the same settings would give
other weights. What the client is after ``setup`` is noted once and compared after each job: for the clients that come
with fedsim one comparison of a dict of plain settings, more only for what could be changed in place.
"""

from __future__ import annotations

import dis
import pickle
import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import getattr_static
from logging import Logger
from operator import length_hint
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.draws import ours
from fedsim.errors import ClientError

PLAIN = (int, float, complex, str, bytes, type(None), range, slice, np.generic, np.dtype)
CODE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, partial, staticmethod, classmethod)
OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout)
FIXED = (*PLAIN, *CODE, *OF_TORCH, property, Logger, PurePath)
CONTAINERS = (dict, list, set, deque, bytearray)
SMALL = 1 << 16  # numbers up to which a tensor's content is compared too, where the client is the user's


class KeptError(ClientError):
    """A client's code keeps something that other clients of the same process would see."""


class Watch:
    """``client`` as it is after its ``setup``; ``check`` says whether it still is."""

    def __init__(self, client: object, **given: object):
        """``given``: what the client finds in its jobs and others find there too, by name: task and model."""
        self.client, self._users = client, not ours(type(client))
        self._held: list[
            tuple[str, Any, Any, type | None]
        ] = []  # path; container or namespace; its copy; whose
        self._tensors: list[tuple[str, Tensor, int, int]] = []  # path, tensor, version, address
        self._read: list[tuple[str, Callable[[], Any], Any]] = []  # path, what to look at, what it was
        self._seen: dict[int, Any] = {id(client): client}
        self._object("", client)
        self._given = [
            (f"job.{name}", vars(thing), known_names(thing))
            for name, thing in given.items()
            if self._users and thing is not None
        ]

    def check(self, number: int, round: int) -> None:
        """After a job of client ``number`` in ``round`` (from 0).

        Raises:
            KeptError: naming class and attribute.
        """
        for path, now, before, kind in self._held:
            try:
                if now == before:
                    continue
            except Exception:  # a tensor or array in the place of another: no truth value
                pass
            self._changed(path, now, before, kind, number, round)
        for path, tensor, version, address in self._tensors:
            if tensor._version != version or tensor.data_ptr() != address:
                self._refuse(path, number, round)
        for path, read, value in self._read:
            if not _same(read(), value):
                self._refuse(path, number, round)
        for path, held, known in self._given:
            if held.keys() - known:
                self._refuse(f"{path}.{next(iter(held.keys() - known))}", number, round)

    def _changed(self, path: str, now: Any, before: Any, kind: type | None, number: int, round: int) -> None:
        """Refuse what differs, but for caches: the value of a ``cached_property`` follows from the object alone."""
        if not isinstance(now, Mapping):
            self._refuse(path, number, round)
        for key in (*before, *(k for k in now if k not in before)):
            if key in now and key in before and _same(now[key], before[key]):
                continue
            if kind is not None and key in getattr(kind, "caches", ()):
                before.update({key: now[key]} if key in now else {})
            elif key not in before and kind is not None and _cached(kind, key):
                before[key] = now[key]
                self._add(_joined(path, key), now[key])
            elif isinstance(now, dict) or not key.startswith(("__", "_abc_")):  # Python's own, on classes
                self._refuse(_joined(path, key, kind), number, round)

    def _refuse(self, path: str, number: int, round: int) -> None:
        where = path if path.startswith(("global ", "job.")) else f"{type(self.client).__name__}.{path}"
        where = re.sub(r"\._(?:parameters|buffers|modules)\['([^']*)'\]", r".\1", where)  # of a module
        raise KeptError(
            f"client {number} in round {round + 1}: {where} has changed since setup. Clients of the same process would "
            "see that and those of other workers would not. Return what a client needs in later rounds in "
            "Update.state (it is in job.state then), put what it needs in this job into job.keep, report numbers in "
            "Update.metrics, draw from job.rng(...), and change copies of what setup made"
        )

    # -- what there is to watch ---------------------------------------------------------------------------------------

    def _object(self, path: str, thing: Any) -> None:
        """All attributes of an object; of the user's clients and layers also those of their classes, and globals."""
        held = getattr(thing, "__dict__", {})
        if thing is not self.client and _options(thing, held):
            return
        self._held.append((path, held, dict(held), type(thing)))
        for name, value in list(held.items()):
            if name not in getattr(type(thing), "caches", ()):
                self._add(_joined(path, name), value)
        for name in _slots(type(thing)):
            self._read.append(
                (_joined(path, name), partial(getattr, thing, name, None), getattr(thing, name, None))
            )
            self._add(_joined(path, name), getattr(thing, name, None))
        kinds = type(thing).__mro__[:-1]
        if thing is self.client or any(ours(kind) for kind in kinds):
            for kind in kinds:
                if not ours(kind):
                    self._class(path, kind)
                elif self._users and not kind.__module__.startswith("torch."):  # SGDClient.calls += 1
                    self._held.append((path, vars(kind), dict(vars(kind)), type(kind)))

    def _class(self, path: str, kind: type) -> None:
        self._held.append((path, vars(kind), dict(vars(kind)), type(kind)))
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                self._globals(function)
            elif not name.startswith("__"):
                self._add(_joined(path, name), value)

    def _globals(self, function: FunctionType) -> None:
        """Globals that a method assigns, and containers and arrays that it mentions."""
        held = function.__globals__
        for action, name in _mentioned(function.__code__):
            value = held.get(name)
            if action == "LOAD_GLOBAL" and isinstance(value, (*CONTAINERS, Tensor, np.ndarray)):
                self._add(f"global {name}", value)
            elif action in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._read.append((f"global {name}", partial(held.get, name), value))

    def _add(self, path: str, value: Any) -> None:
        """Watch a value, unless it cannot change, or is the simulator's own: a ``FlatModel`` is loaded before use."""
        if isinstance(value, FIXED) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, CONTAINERS):
            self._held.append((path, value, _copied(value), None))
            self._inside(path, value)
        elif isinstance(value, tuple | frozenset):
            self._inside(path, value)
        elif isinstance(value, Tensor):
            self._tensor(path, value)
        elif (read := _reader(value)) is not None:
            self._read.append((path, read, read()))
        elif type(value).__module__.partition(".")[0] != "fedsim":
            self._object(path, value)

    def _inside(self, path: str, values: Any) -> None:
        if isinstance(values, bytearray):
            return
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in list(pairs):
            if not isinstance(value, FIXED):
                self._add(_joined(path, key, None), value)

    def _tensor(self, path: str, value: Tensor) -> None:
        if value.layout is not torch.strided or value.device.type == "meta":
            return
        self._tensors.append((path, value, value._version, value.data_ptr()))
        if self._users and value.device.type == "cpu" and value.numel() <= SMALL:  # .data hides from versions
            self._read.append((path, partial(_tensor_bytes, value), _tensor_bytes(value)))


def known_names(thing: object) -> frozenset[str]:
    """Names of attributes that ``thing`` has, and those that the code of its class may give it."""
    kinds = [vars(kind) for kind in type(thing).__mro__]
    values = [
        getattr(value, "func", getattr(value, "fget", value)) for held in kinds for value in held.values()
    ]
    codes = [value.__code__ for value in values if isinstance(value, FunctionType)]
    spelt = {name for code in codes for name in code.co_names}
    return frozenset(vars(thing).keys() | spelt | {name for held in kinds for name in held})


def _reader(value: Any) -> Callable[[], Any] | None:
    """What tells whether ``value`` has changed, for what is neither a container nor an object with attributes."""
    if isinstance(value, np.ndarray):
        return partial(_array_sum, value)
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return lambda: pickle.dumps(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return lambda: pickle.dumps(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate
    if hasattr(value, "__dict__") or _slots(type(value)):
        return None
    return lambda: (repr(value), length_hint(value, -1))  # iterators, counters


def _array_sum(value: np.ndarray) -> int:
    if value.dtype == object:
        return zlib.crc32(repr(value.tolist()).encode())
    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)


def _tensor_bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def _copied(value: Any) -> Any:
    """A shallow copy in the plain type."""
    kinds: tuple[Callable[[Any], Any], ...] = CONTAINERS
    return next(kind(value) for kind in kinds if isinstance(value, kind))  # type: ignore[arg-type]


def _same(now: Any, before: Any) -> bool:
    try:
        return now is before or bool(now == before)
    except Exception:  # two tensors or arrays
        return False


def _options(thing: Any, held: Mapping[str, Any]) -> bool:
    """Whether ``thing`` is a frozen dataclass of ours that holds nothing but plain settings."""
    frozen = getattr(getattr(type(thing), "__dataclass_params__", None), "frozen", False)
    return bool(frozen) and ours(type(thing)) and all(isinstance(value, FIXED) for value in held.values())


def _cached(kind: type, name: str) -> bool:
    """Whether ``name`` is a declared cache, or computed once and then stored under the same name: ``cached_property``
    and its like."""
    if name in getattr(kind, "caches", ()):
        return True
    found = getattr_static(kind, name, None)
    return hasattr(found, "__get__") and not hasattr(found, "__set__") and not isinstance(found, CODE)


def _joined(path: str, key: object, kind: type | None = object) -> str:
    """The path of an attribute (of something of ``kind``), or of an item."""
    if kind is None:
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else str(key)


def _slots(kind: type) -> list[str]:
    """Names of attributes that lie in slots."""
    found: list[str] = []
    for c in kind.__mro__:
        names = vars(c).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [n for n in found if n not in ("__dict__", "__weakref__")]


def _mentioned(code: CodeType) -> Iterator[tuple[str, str]]:
    """What the code does with which globals, functions within it included."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"):
            yield step.opname, str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _mentioned(constant)
