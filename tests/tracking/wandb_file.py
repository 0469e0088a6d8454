"""Reads a ``.wandb`` file: LevelDB-like blocks of 32 KiB with protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as pb

    raw, pos, part = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while pos < len(raw):
        room = BLOCK - pos % BLOCK
        if room < 7:
            pos += room
            continue
        crc, size, kind = struct.unpack("<IHB", raw[pos : pos + 7])
        data = raw[pos + 7 : pos + 7 + size]
        if len(data) < size:
            return  # torn tail of a killed run
        if not size and not kind:
            pos += room
            continue
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == crc
        pos += 7 + size
        part += data
        if kind in (1, 4):  # whole, or last part
            record = pb.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def history(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


def kind(found: list[Any], name: str) -> list[Any]:
    return [getattr(record, name) for record in found if record.WhichOneof("record_type") == name]
