"""Plain values and payloads as Flower's records, and back.

A plain value stands in the record of its message. A payload is a record of arrays under its own name and one of plain
values, ``<name>.values``; a letter before an array's name says how it was packed.
"""

from __future__ import annotations

from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsim.errors import EngineError
from fedsim.exchange.packing import pack, unpack
from fedsim.exchange.payload import Payload
from fedsim.task.layout import Layout

Records = dict[str, ArrayRecord | MetricRecord | ConfigRecord]
AS_IS = "="  # before the name of an array that is not packed
Plain = bool | int | float | str


def put(
    records: Records, plain: dict[str, Any], name: str, value: Any, what: str, layout: Layout | None
) -> None:
    """``value`` under ``name``: a payload as records, a plain one among ``plain``; None and "" are left out."""
    if isinstance(value, Payload):
        arrays, packed = pack(value.arrays, layout)
        held = {
            packed.get(k, AS_IS) + k: Array(t.detach().cpu().contiguous().numpy()) for k, t in arrays.items()
        }
        records[name], records[f"{name}.values"] = ArrayRecord(held), ConfigRecord(dict(value.values))
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
            found = Payload.of(
                {k[1:]: a.numpy() for k, a in record.items()}, config_of(content, f"{key}.values")
            )
            packed = {k[1:]: k[:1] for k in record if k[:1] != AS_IS}
            out[inner] = Payload(unpack(found.arrays, packed, layout), found.values)
    return out


def config_of(content: RecordDict, name: str) -> dict[str, Any]:
    """Plain values of a record."""
    return dict(cast(ConfigRecord, content[name]))
