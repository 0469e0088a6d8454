"""What code computes with that lies outside of layers: globals, variables of classes and closures, defaults, iterators.

Nothing puts these back when another client's work begins, and each worker has its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.config import bytecode
from fedsim.config.code import Reader
from fedsim.config.usermodules import is_users
from fedsim.errors import ConfigError
from fedsim.task.losses import WholeLoss
from fedsim.task.task import Task

PLACES = ("global ", "closure variable ", "defaults of ", "attribute ")  # what is named, see ``Reader``
CACHE = (
    "the cache of "  # how a filled ``lru_cache`` is named: what it holds may follow from its arguments alone
)
TOLERANCE = 1e-6  # relative, between two losses of the same samples
VALUES = (bool, int, float, complex, str, bytes, list, dict, set, tuple, Tensor, np.ndarray)
_LRU = type(lru_cache(len))


class _Noting(Reader):
    """Notes the digest of every named part on the way, the inner ones first; also of what other people's modules and
    classes hold under names that the code spells (``torch.calls``), those of ``spaces`` included."""

    def __init__(self, spaces: Sequence[type]) -> None:
        super().__init__("code")
        self.found: dict[str, bytes] = {}
        self._spaces = spaces

    def _named(self, name: str, x: Any) -> bytes:
        found = super()._named(name, x)
        if name.startswith(PLACES):
            self.found[name] = self.found.get(name, b"") + found  # of positional and named defaults
        return found

    def _parts(self, x: Any) -> Iterator[bytes]:
        if isinstance(x, threading.local):  # of this thread
            return self._all(sorted(vars(x).items()), lambda a: f"attribute '{a}' of a {type(x).__name__}")
        if isinstance(x, _LRU):
            self.found[f"{CACHE}{getattr(x, '__qualname__', x)}"] = str(x.cache_info()).encode()
        return super()._parts(x)

    def _environment(self, names: Iterable[str]) -> Iterator[bytes]:
        parts = list(super()._environment(names))
        self.found |= {f"the environment's {part.split(b'=')[0].decode()}": part for part in parts}
        return iter(parts)

    def _globals(self, f: FunctionType) -> Iterator[bytes]:
        yield from super()._globals(f)
        names, seen = bytecode.names(f.__code__), set[int]()
        spelt = names.others | {text for text in names.texts if text.isidentifier()}
        for thing in (*(f.__globals__.get(name) for name in names.globals), *self._spaces):
            self._others(thing, spelt, seen)

    def _others(self, space: Any, names: frozenset[str], seen: set[int]) -> None:
        """What somebody else's module or class holds under ``names``, and those in it."""
        if not isinstance(space, type | ModuleType) or id(space) in seen:
            return
        if is_users(space.__name__ if isinstance(space, ModuleType) else space.__module__):
            return
        seen.add(id(space))
        for name in names & vars(space).keys():
            value = vars(space)[name]
            if isinstance(value, type | ModuleType):
                self._others(value, names, seen)
            elif type(value) in VALUES and not name.startswith("__"):
                self.found[f"attribute '{name}' of {space.__name__}"] = self._of(value)


def users(things: Iterable[Any]) -> list[Any]:
    """Those functions, classes and objects among ``things`` that the user wrote."""

    def module(thing: Any) -> str | None:
        inner = getattr(thing, "func", thing)  # of a partial
        return getattr(inner, "__module__", None) or type(inner).__module__

    return [thing for thing in things if thing is not None and is_users(module(thing))]


def code_of(task: Task) -> list[Any]:
    """The user's code among model, loss and forward pass of ``task``."""
    layers = list(task.model.modules())
    kinds = {type(m): None for m in layers}
    hooks = [h for m in layers for held in (m._forward_hooks, m._forward_pre_hooks) for h in held.values()]
    loss = task.loss.loss if isinstance(task.loss, WholeLoss) else task.loss
    return users([*kinds, *hooks, loss, task.forward])


def noted(things: Iterable[Any], spaces: Sequence[type] = ()) -> dict[str, bytes]:
    """Digests of what the code of ``things`` looks up, by name; what cannot be told apart by content is left out.

    ``spaces``: classes of ours that it may reach.
    """
    out: dict[str, bytes] = {}
    for thing in things:
        reader = _Noting(spaces)
        try:
            reader.read(thing)
        except ConfigError:
            pass
        except Exception:  # whatever the user's objects raise while they are pickled
            pass
        out = reader.found | out
    return out


def changed(before: Mapping[str, bytes], after: Mapping[str, bytes], but: Iterable[str] = ()) -> str | None:
    """The first name that holds something else, or is new, and where that is looked up; inner ones come first.
    Names in ``but`` do not count."""
    found = [name for name, digest in after.items() if before.get(name) != digest and name not in but]
    if not found:
        return None
    outer = next((name for name in found if name.startswith(PLACES[:3])), found[0])
    return found[0] if found[0] == outer else f"{found[0]}, in {outer},"


def check(what: str, first: float, second: float, moved: str | None) -> str | None:
    """Compare what two passes over the same samples gave; ``moved``: what changed meanwhile.

    Returns what is to be said, if that changed without an effect on the numbers.

    Raises:
        ConfigError: if the numbers differ.
    """
    same = math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=1e-12) or (
        first != first and second != second
    )
    if same and moved is None:
        return None
    seen = "clients of one worker would see it and those of another would not"
    advice = "keep it in an attribute of a layer (self.n), where every client starts anew"
    if same:
        return f"{what}: {moved} changes with each batch: {seen}; {advice}, and report numbers by metrics="
    named = (
        f"{moved} has changed" if moved else "something outside of the layers takes part (a clock, a file?)"
    )
    raise ConfigError(
        f"{what}: the same two samples give {first:.6g}, then {second:.6g}, with the same weights and seeds, since "
        f"{named}: {seen}; {advice}, and draw from torch's, NumPy's or Python's own generators (torch.rand), which are "
        "seeded for each client"
    )
