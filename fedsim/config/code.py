"""A digest of code and values that tells apart what a user brings: the same text in every process, another if edited.

Followed are the user's functions and classes (bytecode, constants, defaults, closures, bases, attributes), the globals
that their code names, modules of torch (structure, attributes, hooks, tensors) and plain values. Of our own code, the
standard library's and that of installed packages the name suffices. No source is read, so it works for notebooks.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from fedsim.config import bytecode
from fedsim.config.usermodules import home, is_users
from fedsim.config.values import ValueReader, hashed

_LRU = type(functools.lru_cache(len))
_NOISE = frozenset(  # of a class: said elsewhere, or different by place and process
    ("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__abstractmethods__", "_abc_impl")
    + ("__slotnames__",)  # which copy and pickle leave there
    + ("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__")
    + ("__firstlineno__", "__static_attributes__", "__parameters__", "__type_params__")
    + ("__dataclass_fields__", "__dataclass_params__")  # their methods and defaults say the same
)


def digest(what: str, thing: Any) -> str:
    """Sha256 (64 hex digits) of the code and content of ``thing``; ``what`` names it in errors.

    Raises:
        ConfigError: if it holds something that cannot be told apart by content, e.g. an open socket.
    """
    return Reader(what).read(thing)


class Reader(ValueReader):
    """Reads code and values; knows afterwards what it met that is not as others would find it.

    Attributes:
        patched: attributes of other people's classes that are the user's functions.
        imported: the user's modules that a process has to import to run the code.
        modules: all the user's modules that hold some of the code, but for the script or notebook itself.
        environment: variables of the environment that the code asks for by a constant name, ``None`` if not set.
    """

    def __init__(self, what: str, *, content: bool = True) -> None:
        super().__init__(what, content=content)
        self.patched: dict[str, None] = {}
        self.imported: dict[str, None] = {}
        self.modules: dict[str, None] = {}
        self.environment: dict[str, str | None] = {}
        self._spelt: list[frozenset[str]] = []  # names in the code of the functions that are being read

    def _parts(self, x: Any) -> Iterator[bytes]:
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, type):
            return self._class(x)
        if isinstance(x, types.CodeType):
            return self._code(x)
        if isinstance(x, type(os.environ)):  # of which single variables are looked up
            return iter((b"environment",))
        if isinstance(x, types.ModuleType):
            return self._module(x)
        if isinstance(x, _LRU):  # which travels by name
            written: Any = getattr(x, "__wrapped__", None)
            module = home(written) if isinstance(written, types.FunctionType) else None
            if module not in (None, "__main__") and is_users(module):
                self.imported[str(module)] = None
        return super()._parts(x)

    def _function(self, f: types.FunctionType) -> Iterator[bytes]:
        """The user's: all that it computes with. Somebody else's: its name, and what it was made for (decorators)."""
        yield b"function"
        original = f.__dict__.get("_torchdynamo_orig_callable")
        if original is not None:
            yield self._of(original)
            return
        self._spelt.append(bytecode.names(f.__code__).spelt.others)
        try:
            yield from self._written(f, f.__code__)
        finally:
            self._spelt.pop()

    def _written(self, f: types.FunctionType, code: types.CodeType) -> Iterator[bytes]:
        module, name = home(f), f.__qualname__
        if is_users(module):
            self._note(module)
            yield self._of(code)
            yield from self._globals(f)
        else:
            yield f"{module}.{code.co_qualname}".encode()
            if not f.__closure__ and "__wrapped__" not in f.__dict__:
                return
        yield self._named(f"defaults of {name}", f.__defaults__)
        yield self._named(f"defaults of {name}", dict(sorted((f.__kwdefaults__ or {}).items())))
        for variable, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
            yield self._named(f"closure variable '{variable}' of {name}", cell)
        yield from self._all(sorted(f.__dict__.items()), lambda a: f"attribute '{a}' of {name}")

    def _module(self, x: types.ModuleType) -> Iterator[bytes]:
        """A module that is no global: in a closure, a default, a container. Of the user's also what is named in it."""
        yield from _mark(x)
        if is_users(x.__name__):
            yield from self._followed(x, frozenset().union(*self._spelt), f"module '{x.__name__}'")

    def _code(self, code: types.CodeType) -> Iterator[bytes]:
        yield from bytecode.parts(code)
        for constant in bytecode.constants(code):
            yield self._of(constant)

    def _globals(self, f: types.FunctionType) -> Iterator[bytes]:
        """What the globals named in the code are now, and what it imports when it runs; of a module what it names."""
        names = bytecode.names(f.__code__).spelt
        space = f.__globals__
        values = [space[name] for name in names.globals if name in space]
        if names.reads_environment or any(v is os.environ or v is os.getenv for v in values):
            values += f.__defaults__ or ()
            yield from self._environment({*names.texts, *(v for v in values if type(v) is str)})
        for name in sorted(names.globals):
            if name in space:
                what = f"global '{name}' of {f.__qualname__}"
                yield from self._looked_up(name, space[name], names.others, what)
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

    def _environment(self, names: Iterable[str]) -> Iterator[bytes]:
        """What variables of the environment are now, those of ``names`` that are set."""
        for name in sorted(names):
            value = os.environ.get(name) if name.isidentifier() else None
            if name.isidentifier():
                self.environment[name] = value
            if value is not None:
                yield f"{name}={value}".encode("utf-8", "surrogateescape")

    def _looked_up(self, name: str, value: Any, names: frozenset[str], what: str) -> Iterator[bytes]:
        yield name.encode()
        yield hashed(*_mark(value)) if isinstance(value, types.ModuleType) else self._named(what, value)
        yield from self._inside(value, names, what)

    def _inside(self, module: Any, names: frozenset[str], what: str) -> Iterator[bytes]:
        """Those ``names`` that the user's ``module`` has, and so on in modules within; nothing of anything else."""
        if not isinstance(module, types.ModuleType) or not is_users(module.__name__):
            return
        if id(module) in self._open:
            return
        self._open[id(module)] = len(self._open)
        yield from self._followed(module, names, what)
        del self._open[id(module)]

    def _followed(self, module: types.ModuleType, names: frozenset[str], what: str) -> Iterator[bytes]:
        for name in sorted(names & vars(module).keys()):
            yield from self._looked_up(name, vars(module)[name], names, f"{what}: '{name}'")

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
        self._note(kind.__module__)
        if type(kind) is not type:
            yield self._of(type(kind))
        own = sorted((k, v) for k, v in vars(kind).items() if k not in _NOISE)
        yield from self._all(own, lambda a: f"attribute '{a}' of {kind.__qualname__}")

    def _note(self, module: str | None) -> None:
        if module in sys.modules and module != "__main__":
            self.modules[str(module)] = None

    def _patches(self, kind: type) -> Iterator[bytes]:
        """The user's functions among the attributes of somebody else's class."""
        for name, value in list(vars(kind).items()):
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            module = home(function) if isinstance(function, types.FunctionType) else None
            if module in sys.modules and is_users(module):
                self.patched[f"{kind.__module__}.{kind.__qualname__}.{name}"] = None
                yield name.encode()
                yield self._of(function)


def _mark(module: types.ModuleType) -> tuple[bytes, bytes]:
    """What stands for a module: the user's may be called otherwise in another process."""
    return b"module", b"" if is_users(module.__name__) else module.__name__.encode()
