"""A digest of values, kind by kind: the same for a copy, another one where something that counts is another."""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from fedsim.config import bytecode, content
from fedsim.errors import ConfigError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_NAMED = (
    types.BuiltinFunctionType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
)
_STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.local,
)  # of a process; weak ones are caches
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_LRU = type(functools.lru_cache(len))


class ValueReader:
    """Reads values; what functions, classes and modules are made of is left to whoever knows code.

    Args:
        what: name of the thing in errors.
        content: whether tensors and arrays are told apart by their content, or by shape and type only.
    """

    def __init__(self, what: str, *, content: bool = True) -> None:
        self._content = content
        self._path = [what]
        self._open: dict[int, int] = {}  # what is being read, by depth: things may refer to themselves
        self._done: dict[int, tuple[Any, bytes]] = {}
        self._numbers: dict[
            int, tuple[int, Any]
        ] = {}  # of tensors and modules: it matters whether two are one

    def read(self, thing: Any) -> str:
        """Digest of ``thing``, in hex."""
        try:
            return self._of(thing).hex()
        except RecursionError:
            raise ConfigError(f"{self._path[0]}: nested too deeply to be told apart by content") from None

    def _of(self, x: Any) -> bytes:
        kind = type(x)
        if kind in _PLAIN:
            return hashed(b"plain", kind.__name__.encode(), _plain(x))
        at = id(x)
        if at in self._done:
            return self._done[at][1]
        if at in self._open:
            return hashed(b"within", str(len(self._open) - self._open[at]).encode())
        self._open[at] = len(self._open)
        try:
            found = hashed(*self._parts(x))
        finally:
            del self._open[at]
        if not content.is_shared(x) and not isinstance(x, types.ModuleType):
            self._done[at] = x, found
        return found

    def _named(self, name: str, x: Any) -> bytes:
        """Digest of ``x``, which errors call ``name``."""
        with self._within(name):
            return self._of(x)

    @contextmanager
    def _within(self, name: str) -> Iterator[None]:
        self._path.append(name)
        yield
        self._path.pop()

    def _all(self, items: Iterable[tuple[str, Any]], name: Callable[[str], str] = str) -> Iterator[bytes]:
        for key, value in items:
            yield key.encode()
            yield self._named(name(key), value)

    def _parts(self, x: Any) -> Iterator[bytes]:
        """What makes ``x`` what it is, kind by kind."""
        if content.is_shared(x):
            return self._shared(x)
        kind = type(x)
        if isinstance(x, types.MethodType):
            return self._sequence(b"method", (x.__self__, x.__func__))
        if isinstance(x, staticmethod | classmethod):
            return self._sequence(kind.__name__.encode(), (x.__func__,))
        if kind is property:
            return self._sequence(b"property", (x.fget, x.fset, x.fdel))
        if isinstance(x, functools.partial):
            return self._sequence(b"partial", (x.func, x.args, dict(sorted(x.keywords.items()))))
        if isinstance(x, _LRU):
            return self._sequence(b"cached", (x.__wrapped__, x.cache_parameters()))
        if isinstance(x, _NAMED):
            return self._builtin(x)
        if isinstance(x, types.CellType):
            return self._sequence(b"cell", [x.cell_contents] if bytecode.is_filled(x) else [])
        if kind in (dict, types.MappingProxyType):
            plain = _all_plain(x) and _all_plain(x.values())
            return iter((b"dict", repr(x).encode())) if plain and kind is dict else self._mapping(x)
        if kind in (list, tuple):
            name = kind.__name__.encode()
            return iter((name, repr(x).encode())) if _all_plain(x) else self._sequence(name, x)
        if kind in (set, frozenset):
            return iter((kind.__name__.encode(), *sorted(map(self._of, x))))
        if isinstance(x, weakref.ref):
            return self._sequence(b"weakref", (x(),))
        if kind in _STATELESS or kind in _WEAK or any(x is s for s in _streams()):
            return iter((b"stateless", kind.__name__.encode()))
        if isinstance(x, PurePath | types.GenericAlias):
            return iter((kind.__name__.encode(), str(x).encode()))
        array = content.array(x, self._content)
        return self._object(x) if array is None else iter(array)

    def _shared(self, x: Any) -> Iterator[bytes]:
        """A tensor or a module: where it is met again, that it is the same one."""
        if (seen := self._numbers.get(id(x))) is not None:
            yield f"again {seen[0]}".encode()
            return
        self._numbers[id(x)] = len(self._numbers), x
        yield b"shared"
        yield self._of(type(x))
        if content.is_tensor(x):
            yield from content.tensor(x, self._content)
            if own := getattr(x, "__dict__", None):  # marks such as weight.no_decay
                yield from self._all(sorted(own.items()), lambda a: f"attribute '{a}' of a tensor")
            return
        name = type(x).__qualname__
        for group, items in content.layers(x):
            yield group.encode()
            yield from self._all(items, lambda a: f"'{a}' of {name}")

    def _builtin(self, x: Any) -> Iterator[bytes]:
        owner = getattr(x, "__objclass__", None) or getattr(x, "__self__", None)
        yield b"builtin"
        yield f"{getattr(x, '__module__', None)}.{getattr(x, '__qualname__', x)}".encode()
        if owner is not None and not isinstance(owner, type | types.ModuleType):
            yield self._named(f"object of {x.__name__}", owner)

    def _mapping(self, x: Mapping[Any, Any]) -> Iterator[bytes]:
        yield b"dict"
        for key, value in x.items():
            yield self._of(key)
            yield self._named(f"['{key}']" if isinstance(key, str) else "a value", value)

    def _sequence(self, kind: bytes, items: Iterable[Any]) -> Iterator[bytes]:
        yield kind
        yield from map(self._of, items)

    def _object(self, x: Any) -> Iterator[bytes]:
        """Anything else is what pickle would make of it."""
        try:
            made = content.reduced(x)
        except Exception as error:
            where = ", in ".join(self._path[:0:-1]) or "itself"
            raise ConfigError(
                f"{self._path[0]}: {type(x).__module__}.{type(x).__qualname__} ({where}) cannot be "
                f"told apart by content ({error}), so a run with another one would be taken for this one; make it "
                "inside the function that uses it, or leave out dir=..., so that every run has a folder of its own"
            ) from error
        name = type(x).__qualname__
        yield b"object"
        yield self._of(type(x))
        if isinstance(made, str):
            yield made.encode()
            return
        function, args, state, *more = (*made, None, None, None)[:5]
        yield self._of(function)
        yield self._named(name, args)
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict) and all(isinstance(k, str) for k in part):
                yield b"attributes"
                yield from self._all(sorted(part.items()), lambda a: f"attribute '{a}' of {name}")
            else:
                yield self._named(name, part)
        for items in more:
            yield self._named(name, None if items is None else list(items))


def _streams() -> list[Any]:
    return [sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]


def _all_plain(items: Iterable[Any]) -> bool:
    return all(type(item) in _PLAIN for item in items)


def _plain(x: Any) -> bytes:
    return x if isinstance(x, bytes) else repr(x).encode("utf-8", "backslashreplace")


def hashed(*parts: bytes) -> bytes:
    """Sha256 (32 bytes) of ``parts``, each with its length."""
    out = hashlib.sha256()
    for part in parts:
        out.update(len(part).to_bytes(8, "little"))
        out.update(part)
    return out.digest()
