"""A digest of code and values that tells apart what a user brings: the same text in every process, another if edited.

Followed are the user's functions and classes (bytecode, constants, defaults, closures, bases, attributes), the globals
that their code names, modules of torch (structure, attributes, hooks, tensors) and plain values. Of our own code, the
standard library's and that of installed packages the name suffices. No source is read, so it works for notebooks.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from fedsim.config import bytecode, content
from fedsim.config.usermodules import home, is_users
from fedsim.errors import ConfigError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_NAMED = (
    BuiltinFunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
_STATELESS = (type(threading.Lock()), type(threading.RLock()))  # and what holds things weakly: a cache
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_CLASS_NOISE = frozenset(  # said elsewhere, or different by place and process
    "__module__ __dict__ __weakref__ __doc__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__firstlineno__ __static_attributes__ __abstractmethods__ _abc_impl __dataclass_fields__ __dataclass_params__ "
    "__orig_bases__ __parameters__ __type_params__ __qualname__".split()
)
_LRU = type(functools.lru_cache(len))


def digest(what: str, thing: Any) -> str:
    """Sha256 (64 hex digits) of the code and content of ``thing``; ``what`` names it in errors.

    Raises:
        ConfigError: if it holds something that cannot be told apart by content, e.g. an open socket.
    """
    return Reader(what).read(thing)


class Reader:
    """Reads things; knows afterwards what of other people's code was ``patched``, and what is ``imported`` late.

    Args:
        what: name of the thing in errors.
        content: whether tensors and arrays are told apart by their content, or by shape and type only.
    """

    def __init__(self, what: str, *, content: bool = True) -> None:
        self.patched: dict[str, None] = {}  # attributes of others' classes that are the user's functions
        self.imported: dict[str, None] = {}  # the user's modules that a process must import to run the code
        self._content = content
        self._path = [what]
        self._open: dict[int, int] = {}  # what is being read, by depth: things may refer to themselves
        self._done: dict[int, tuple[Any, bytes]] = {}
        self._numbers: dict[int, tuple[int, Any]] = {}  # of tensors and modules, for which it matters whether two are one

    def read(self, thing: Any) -> str:
        """Digest of ``thing``, in hex."""
        try:
            return self._of(thing).hex()
        except RecursionError:
            raise ConfigError(f"{self._path[0]}: nested too deeply to be told apart by content") from None

    def _of(self, x: Any) -> bytes:
        kind = type(x)
        if kind in _PLAIN:
            return _hash(b"plain", kind.__name__.encode(), _plain(x))
        at = id(x)
        if at in self._done:
            return self._done[at][1]
        if at in self._open:
            return _hash(b"within", str(len(self._open) - self._open[at]).encode())
        self._open[at] = len(self._open)
        try:
            found = _hash(*self._parts(x))
        finally:
            del self._open[at]
        if not content.is_shared(x):
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
        if isinstance(x, FunctionType):
            return self._function(x)
        if isinstance(x, type):
            return self._class(x)
        if isinstance(x, CodeType):
            return self._code(x)
        if isinstance(x, ModuleType):
            return iter((b"module", b"" if is_users(x.__name__) else x.__name__.encode()))
        if content.is_shared(x):
            return self._shared(x)
        return self._value(x)

    def _value(self, x: Any) -> Iterator[bytes]:
        kind = type(x)
        if isinstance(x, MethodType):
            return self._sequence(b"method", (x.__self__, x.__func__))
        if isinstance(x, staticmethod | classmethod):
            return self._sequence(kind.__name__.encode(), (x.__func__,))
        if kind is property:
            return self._sequence(b"property", (x.fget, x.fset, x.fdel))
        if isinstance(x, functools.partial):
            return self._sequence(b"partial", (x.func, x.args, dict(sorted(x.keywords.items()))))
        if isinstance(x, _LRU):
            self._note_cached(x)
            return self._sequence(b"cached", (x.__wrapped__, x.cache_parameters()))  # type: ignore[attr-defined]
        if isinstance(x, _NAMED):
            return self._builtin(x)
        if isinstance(x, CellType):
            return self._sequence(b"cell", [x.cell_contents] if bytecode.is_filled(x) else [])
        if kind in (dict, MappingProxyType):
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
        if isinstance(x, PurePath | GenericAlias):
            return iter((kind.__name__.encode(), str(x).encode()))
        array = content.array(x, self._content)
        return self._object(x) if array is None else iter(array)

    def _function(self, f: FunctionType) -> Iterator[bytes]:
        """The user's: all that it computes with. Somebody else's: its name, and what it was made for (decorators)."""
        module, code = home(f), f.__code__
        yield b"function"
        original = f.__dict__.get("_torchdynamo_orig_callable")
        if original is not None:
            yield self._of(original)
            return
        if is_users(module):
            yield self._of(code)
            yield from self._globals(f)
        else:
            yield f"{module}.{code.co_qualname}".encode()
            if not f.__closure__ and "__wrapped__" not in f.__dict__:
                return
        name = f.__qualname__
        yield self._named(f"defaults of {name}", f.__defaults__)
        yield self._named(f"defaults of {name}", dict(sorted((f.__kwdefaults__ or {}).items())))
        for variable, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
            yield self._named(f"closure variable '{variable}' of {name}", cell)
        yield from self._all(sorted(f.__dict__.items()), lambda a: f"attribute '{a}' of {name}")

    def _code(self, code: CodeType) -> Iterator[bytes]:
        yield from bytecode.parts(code)
        for constant in bytecode.constants(code):
            yield self._of(constant)

    def _globals(self, f: FunctionType) -> Iterator[bytes]:
        """What the globals named in the code are now, and what it imports when it runs; of a module what it names."""
        names = bytecode.names(f.__code__)
        space = f.__globals__
        for name in sorted(names.globals):
            yield name.encode()
            if name in space:
                what = f"global '{name}' of {f.__qualname__}"
                yield self._named(what, space[name])
                yield from self._inside(space[name], names.others, what)
        for name in sorted(names.imports):
            if not is_users(name) or name.partition(".")[0] == "__main__":
                continue
            try:
                module = sys.modules.get(name) or import_module(name)
            except Exception:  # it will fail, or be avoided, when the code runs
                yield b"absent"
                continue
            self.imported[name] = None
            yield from self._inside(module, names.others, f"module '{name}' of {f.__qualname__}")

    def _inside(self, module: Any, names: frozenset[str], what: str) -> Iterator[bytes]:
        """Those ``names`` that the user's ``module`` has, and so on in modules within; nothing of anything else."""
        if not isinstance(module, ModuleType) or not is_users(module.__name__):
            return
        if id(module) in self._open:
            return
        self._open[id(module)] = len(self._open)
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            yield name.encode()
            yield self._named(f"{what}: '{name}'", value)
            yield from self._inside(value, names, what)
        del self._open[id(module)]

    def _class(self, kind: type) -> Iterator[bytes]:
        users = is_users(kind.__module__)
        yield b"class"
        yield (kind.__qualname__ if users else f"{kind.__module__}.{kind.__qualname__}").encode()
        if not users:
            yield from self._patches(kind)
        for base in kind.__bases__:
            if base is not object:
                yield self._of(base)
        if not users:
            return
        if type(kind) is not type:
            yield self._of(type(kind))
        own = sorted((k, v) for k, v in vars(kind).items() if k not in _CLASS_NOISE)
        yield from self._all(own, lambda a: f"attribute '{a}' of {kind.__qualname__}")

    def _patches(self, kind: type) -> Iterator[bytes]:
        """The user's functions among the attributes of somebody else's class."""
        for name, value in list(vars(kind).items()):
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if isinstance(function, FunctionType) and (module := home(function)) in sys.modules:
                if is_users(module):
                    self.patched[f"{kind.__module__}.{kind.__qualname__}.{name}"] = None
                    yield name.encode()
                    yield self._of(function)

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
            return
        name = type(x).__qualname__
        for group, items in content.layers(x):
            yield group.encode()
            yield from self._all(items, lambda a: f"'{a}' of {name}")

    def _builtin(self, x: Any) -> Iterator[bytes]:
        owner = getattr(x, "__objclass__", None) or getattr(x, "__self__", None)
        yield b"builtin"
        yield f"{getattr(x, '__module__', None)}.{getattr(x, '__qualname__', x)}".encode()
        if owner is not None and not isinstance(owner, type | ModuleType):
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

    def _note_cached(self, x: Any) -> None:
        """A cached function travels by name."""
        module = home(x.__wrapped__) if isinstance(x.__wrapped__, FunctionType) else None
        if module is not None and module != "__main__" and is_users(module):
            self.imported[module] = None


def _streams() -> list[Any]:
    return [sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]


def _all_plain(items: Iterable[Any]) -> bool:
    return all(type(item) in _PLAIN for item in items)


def _plain(x: Any) -> bytes:
    return x if isinstance(x, bytes) else repr(x).encode("utf-8", "backslashreplace")


def _hash(*parts: bytes) -> bytes:
    out = hashlib.sha256()
    for part in parts:
        out.update(len(part).to_bytes(8, "little"))
        out.update(part)
    return out.digest()
