"""How Ray pickles tensors: as arrays in its object store, or, of a model's large fixed part, as where they lie."""

from __future__ import annotations

import mmap
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.ray.inplace import InPlace
from fedsim.engine.ray.transport.memory import Address
from fedsim.task.mapped import Memory, Place, place_of

UNUSED = ("pyarrow", "pydantic", "starlette")  # packages that Ray imports to send objects of theirs


@contextmanager
def light() -> Iterator[None]:
    """Within it, Ray finds none of ``UNUSED`` and does without: they are some 40 MB of a worker's memory."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    absent: dict[str, Any] = dict.fromkeys(hidden)
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def share_tensors() -> None:
    """Pickle CPU tensors as numpy arrays, so that both sides of a transfer map shared memory instead of copying."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_to_numpy, deserializer=_from_numpy)
    ray.util.register_serializer(torch.nn.Parameter, serializer=_from_parameter, deserializer=_to_parameter)


AS_INTEGERS = {1: torch.uint8, 2: torch.int16}  # by bytes an entry: types that numpy lacks (bfloat16, float8)


class Reference(NamedTuple):
    """A tensor in shared memory (``fedsim.task.mapped``): workers of this machine map it too.

    ``content``, on a cluster, is the whole memory in Ray's object store, for workers of other machines.
    """

    address: Address
    content: Any
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _Referring:
    """Whether tensors in shared memory are sent as references."""

    on: bool = False
    store: Any = None  # Ray, if there are other machines that need the content
    stored: dict[Memory, Any] = field(default_factory=dict)
    moved: InPlace | None = None  # what is moved for it, if all workers are on this machine


_referring = _Referring()
_opened: WeakValueDictionary[str, mmap.mmap] = WeakValueDictionary()  # in a worker: mapped memories, by name
_memories: WeakValueDictionary[str, Memory] = WeakValueDictionary()


@contextmanager
def referring(store: Any, moved: InPlace | None = None) -> Iterator[list[Any]]:
    """Within it, tensors in shared memory are pickled as references; ``store`` is Ray where other machines take part.
    Where none does, large tensors are moved there by ``moved``, unless it has moved them already.

    Gives a list that, at the end, holds what must be kept as long as the references are used.
    """
    kept: list[Any] = []
    moved = moved or InPlace()
    _referring.on, _referring.store, _referring.moved = True, store, moved if store is None else None
    try:
        yield kept
    finally:
        kept += [*_referring.stored.values(), *moved.memories]
        _referring.on, _referring.store, _referring.stored, _referring.moved = False, None, {}, None


def _reference(t: Tensor) -> Reference | None:
    place = place_of(t) if _referring.on else None
    if place is None and _referring.moved is not None:
        place = _referring.moved.place(t)
    if place is None:
        return None
    memory, store, stored = place.memory, _referring.store, _referring.stored
    if store is not None and memory not in stored:
        stored[memory] = store.put(np.frombuffer(memory.map(), dtype=np.uint8))
    address = Address(os.getpid(), memory.fd, memory.name)
    return Reference(address, stored.get(memory), place.start, place.dtype, place.shape, place.stride)


def _mapped(found: Reference) -> Tensor:
    name = found.address.name
    memory, mapping = _memories.get(name), _opened.get(name)
    if memory is None or mapping is None:
        _memories[name] = memory = _memory(found)
        _opened[name] = mapping = memory.map()
    return Place(memory, *found[2:]).view(mapping)


def _memory(found: Reference) -> Memory:
    """The driver's own, or on another machine one with its content."""
    try:
        return Memory(found.address.open(), found.address.name)
    except OSError:
        if found.content is None:
            raise
    import ray

    content = ray.get(found.content)
    memory = Memory.of_size(len(content))
    memory.write(0, memoryview(content))
    memory.seal()
    return memory


def _to_numpy(t: Tensor) -> Any:
    if (found := _reference(t)) is not None:
        return found
    t = t.detach().cpu().contiguous()
    try:
        return t.numpy()
    except TypeError:
        return t.view(AS_INTEGERS[t.itemsize]).numpy(), t.dtype


def _from_numpy(a: Any) -> Tensor:
    if isinstance(a, Reference):
        return _mapped(a)
    if isinstance(a, tuple):
        return _from_numpy(a[0]).view(a[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": every receiver treats these as read-only
        return torch.from_numpy(a)


def _from_parameter(p: torch.nn.Parameter) -> tuple[Any, bool]:
    return _to_numpy(p), p.requires_grad


def _to_parameter(parts: tuple[Any, bool]) -> torch.nn.Parameter:
    value = _from_numpy(parts[0])
    return torch.nn.Parameter(
        value if isinstance(parts[0], Reference) else value.clone(), requires_grad=parts[1]
    )
