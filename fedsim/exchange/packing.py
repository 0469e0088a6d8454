"""Flat vectors on their way: padding is left out, and put back by whoever receives them.

A flat vector is an array that is as long as one of the layout's (its last axis; stacks of vectors count too) and
whose padding is all zero. Any other array travels as it is, so nothing is ever lost but the sign of a padding zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.payload import Payload
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout, Slots

Packed = dict[str, str]  # names of what was packed to its kind: ``w`` or ``b``, see ``Layout.vectors``


def pack(arrays: Mapping[str, Tensor], layout: Layout | None) -> tuple[dict[str, Tensor], Packed]:
    """The arrays as they travel, and which of them were packed; without a layout none are."""
    out, packed = dict(arrays), Packed()
    if layout is None:
        return out, packed
    for name, array in arrays.items():
        if kind := kind_of(array, layout):
            out[name], packed[name] = layout.vectors[kind].compact(array), kind
    return out, packed


def unpack(arrays: Mapping[str, Tensor], packed: Mapping[str, str], layout: Layout) -> dict[str, Tensor]:
    """The inverse of :func:`pack`.

    Raises:
        ClientError: naming what cannot have been packed under this layout.
    """
    out = dict(arrays)
    for name, kind in packed.items():
        out[name] = slots_of(name, kind, arrays[name].shape, layout).expand(arrays[name])
    return out


def slots_of(name: str, kind: str, shape: Sequence[int], layout: Layout) -> Slots:
    """Where the numbers of a packed array of that ``shape`` belong.

    Raises:
        ClientError: naming what cannot have been packed under this layout.
    """
    slots = layout.vectors.get(kind)
    if slots is None or not shape or shape[-1] != slots.size:
        raise ClientError(
            f"array '{name}': {tuple(shape)} is no packed vector of kind '{kind}'; expected (..., "
            f"{'?' if slots is None else slots.size}). Do both sides have the same model and version?"
        )
    return slots


def hashes_of(payload: Payload, layout: Layout, prefix: str) -> dict[str, str]:
    """Sha256 of each array as it travels, under ``prefix`` and its name; of all values together as ``(values)``."""
    packed, _ = pack(payload.arrays, layout)
    found = {f"{prefix}{name}": hash_tensors([array]) for name, array in packed.items()}
    if payload.values:
        found[f"{prefix}(values)"] = sha256(repr(sorted(payload.values.items())).encode()).hexdigest()
    return found


def sent_bytes(payload: Payload, layout: Layout, padded: Callable[[Tensor], bool] | None = None) -> int:
    """Bytes of the payload's content as it travels: ``nbytes`` without the padding of flat vectors. ``padded`` knows of
    vectors (d,) whose padding is zero, which saves a look at it."""
    found = payload.nbytes
    for t in payload.arrays.values():
        if padded is not None and layout.plain and padded(t):
            found -= (layout.dim - layout.size) * t.element_size()
        else:
            found -= _padding(t, layout)
    return found


def row_bytes(rows: Mapping[str, Tensor], layout: Layout) -> int:
    """Bytes of one client's rows of ``rows``, arrays (n, ...), as they travel."""
    return sum(t[0].numel() * t.element_size() - _padding(t[0], layout) for t in rows.values() if len(t))


def _padding(t: Tensor, layout: Layout) -> int:
    kind = kind_of(t, layout)
    if not kind:
        return 0
    slots = layout.vectors[kind]
    return t.numel() // slots.dim * (slots.dim - slots.size) * t.element_size()


def kind_of(t: Tensor, layout: Layout) -> str:
    """The kind of a vector that has padding to leave out, else nothing."""
    shape = t.shape
    if shape and shape[-1] in layout.padded:
        for kind, slots in layout.padded[shape[-1]]:
            if slots.holds(t):
                return kind
    return ""
