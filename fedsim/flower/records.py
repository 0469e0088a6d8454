"""Plain values and payloads as Flower's records, and back.

A plain value stands in the record of its message. A payload is a record of arrays under its own name and one of plain
values, ``<name>.values``; a letter before an array's name says how it was packed.
"""

from __future__ import annotations

from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.errors import EngineError
from fedsim.exchange.packing import kind_of, slots_of
from fedsim.exchange.payload import Payload
from fedsim.exchange.travelling import as_array
from fedsim.flower.longvectors import Arrived, arrived, in_parts, is_long
from fedsim.flower.pieces import record_of
from fedsim.task.layout import Layout

Records = dict[str, ArrayRecord | MetricRecord | ConfigRecord]
AS_IS = "="  # before the name of an array that is not packed
Plain = bool | int | float | str


def put(
    records: Records, plain: dict[str, Any], name: str, value: Any, what: str, layout: Layout | None
) -> None:
    """``value`` under ``name``: a payload as records, a plain one among ``plain``; None and "" are left out."""
    if isinstance(value, Payload):
        held = dict[str, Array]()
        for key, array in value.arrays.items():
            held |= _held(key, array.detach().cpu(), layout)
        records[name], records[f"{name}.values"] = record_of(held), ConfigRecord(dict(value.values))
    elif isinstance(value, Plain):
        if value != "":
            plain[name] = value
    elif value is not None:
        raise EngineError(
            f"{what}: {type(value).__name__} cannot travel to a node; a payload or plain value can"
        )


def taken(content: RecordDict, name: str, layout: Layout) -> dict[str, Any]:
    """What :func:`put` put into the records of that name; payloads are validated like any other."""
    out = config_of(content, name)
    for key, record in content.items():
        inner = key.removeprefix(f"{name}.")
        if key != inner and isinstance(record, ArrayRecord):
            arrays = {a.name: _array_of(a, layout) for a in arrived(record)}
            out[inner] = Payload.of(arrays, config_of(content, f"{key}.values"))
    return out


def _held(name: str, array: Tensor, layout: Layout | None) -> dict[str, Array]:
    """An array under its key, in parts if it is long."""
    kind = kind_of(array, layout) if layout is not None else ""
    key, slots = (kind or AS_IS) + name, layout.vectors[kind] if kind and layout is not None else None
    if is_long(array):
        return in_parts(key, name, array, slots)
    return {key: Array((slots.compact(array) if slots else array).contiguous().numpy())}


def _array_of(found: Arrived, layout: Layout) -> Tensor:
    """The inverse of :func:`_held`; memory of its own."""
    slots = slots_of(found.name, found.kind, found.shape, layout) if found.kind != AS_IS else None
    if len(found.parts) > 1:
        return found.whole(slots)
    array = as_array(found.name, found.parts[0].numpy())
    return slots.expand(array) if slots else array


def config_of(content: RecordDict, name: str) -> dict[str, Any]:
    """Plain values of a record."""
    return dict(cast(ConfigRecord, content[name]))
