"""Whether a tuple or list of arrays is several inputs, or one with an entry for each sample.

A tree's tensors have an entry for each sample; a list of samples has itself one. So with n samples, known from the
other half of the pair, only one reading fits, unless there are as many inputs as samples. Then the other participants
say which it is, and where nobody can: a tuple is several inputs, a list one of samples. Named tuples and dicts are
always several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.data.arrays import array, pandas_kind, refuse
from fedsim.data.lazy import Mapped

Sizes = frozenset[int] | None  # how many samples there may be; ``None``: that cannot be told


@dataclass
class Reading:
    """Reads the two halves of what one participant hands over.

    ``sizes``: how many samples there may be; ``always``: every tuple and list is several inputs, as in ``Samples``.
    ``sure`` becomes false where both readings fit.
    """

    sizes: Sizes
    always: bool = False
    sure: bool = True

    def tree(self, what: str, value: Any, like: Any = None) -> Any:
        """``value`` as an array, or a tree of arrays; of two readings the one of ``like``, another participant's."""
        if isinstance(value, Mapping):
            if not value:
                refuse(what, "is an empty dict", "hand over its arrays by name")
            known = like if isinstance(like, Mapping) else {}
            return {str(k): self.tree(f"{what}[{k!r}]", v, known.get(str(k))) for k, v in value.items()}
        if isinstance(value, tuple | list) and self._several(value, like):
            made = [self.tree(f"{what}{at}", v, part) for at, v, part in _places(value, like)]
            return remade(value, made)
        if is_dataclass(value) and not isinstance(value, type):
            kind = type(value).__name__
            refuse(
                what, f"is a dataclass, {kind}", "hand over vars(...), a dict of its fields, or a NamedTuple"
            )
        return array(what, value)

    def _several(self, value: Sequence[Any], like: Any) -> bool:
        if is_named(value) or (self.always and len(value)):
            return True
        if not _holds(value):
            return False
        parts = [sizes_of(v) for v in value]
        known = [s for s in parts if s is not None]
        common = frozenset.intersection(*known) if len(known) == len(parts) else frozenset[int]()
        inputs = bool(common) and (self.sizes is None or bool(common & self.sizes))
        entries = (self.sizes is None or len(value) in self.sizes) and _alike(value)
        if inputs and entries:
            if like is not None:
                return isinstance(like, tuple | list) and len(like) == len(value)
            self.sure = False
            return isinstance(value, tuple)
        if inputs or entries or self.sizes is None or len(value) in self.sizes:
            return inputs
        return any(
            s is not None and s & self.sizes for s in parts
        )  # one of them is too short: said by its name


def sizes_of(value: Any) -> Sizes:
    """How many samples ``value`` may hold: with two readings, two numbers."""
    if isinstance(value, Mapping):
        return _common(list(value.values()))
    if is_named(value):
        return _common(value)
    if isinstance(value, tuple | list) and _holds(value):
        return frozenset({len(value)}) | (_common(value) or frozenset())
    if isinstance(value, Tensor | np.ndarray):
        return frozenset({len(value)}) if value.ndim and not getattr(value, "is_nested", False) else None
    return frozenset({len(value)}) if hasattr(value, "__len__") and not isinstance(value, str) else None


def remade(like: Sequence[Any], parts: list[Any]) -> Any:
    """``parts`` in a tuple, named tuple or list, as ``like`` is."""
    kind: Any = type(like)
    return kind._make(parts) if is_named(like) else tuple(parts) if isinstance(like, tuple) else parts


def is_named(value: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_make")


def _common(values: Sequence[Any]) -> Sizes:
    """The sizes that all have; of unequal ones the first's."""
    found = [s for s in map(sizes_of, values) if s is not None]
    if len(found) < len(values) or not found:
        return None
    return frozenset.intersection(*found) or found[0]


def _holds(value: Sequence[Any]) -> bool:
    """Whether arrays, dicts and the like are among its entries, and not only numbers or text."""
    if any(
        isinstance(v, Tensor | np.ndarray | Mapped | Mapping) or is_named(v) or pandas_kind(v) for v in value
    ):
        return True
    return bool(value) and isinstance(value[0], tuple | list) and _holds(value[0])


def _alike(value: Sequence[Any]) -> bool:
    """Whether its entries may be samples of one shape."""
    if any(isinstance(v, Mapping) or is_named(v) for v in value):
        return False
    return len({tuple(np.shape(v)) if isinstance(v, np.ndarray | Tensor) else None for v in value}) == 1


def _places(value: Sequence[Any], like: Any) -> list[tuple[str, Any, Any]]:
    """Each entry with its name for messages, and its counterpart."""
    names = [f".{f}" for f in value._fields] if is_named(value) else [f"[{i}]" for i in range(len(value))]  # type: ignore[attr-defined]
    known = list(like) if isinstance(like, tuple | list) and len(like) == len(value) else [None] * len(value)
    return list(zip(names, value, known, strict=True))
