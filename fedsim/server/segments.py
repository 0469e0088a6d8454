"""Segment files: the states of many clients in one safetensors file, written and read one tensor at a time.

The library's own writer copies all tensors of a file into memory, and its reader looks at the whole header to find one
client; here a file may be larger than memory, and a client's state is read where it lies.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.errors import CheckpointError

State = Mapping[str, Tensor]
DTYPES = {  # as safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"states-\d+\.safetensors", re.ASCII)
ALIGNED = 8  # bytes that the header's length is a multiple of


class Kind(NamedTuple):
    """A tensor without its content."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Schema = tuple[Kind, ...]  # of one client's state; nearly always the same for all clients
Place = tuple[Schema, tuple[int, ...]]  # and where in the file each tensor begins


@dataclass
class Segment:
    """A file that is complete, and what of it still counts."""

    path: Path
    checksum: str  # sha256
    size: int  # bytes of all tensors in it
    places: dict[int, Place]  # of the clients whose state here is the one that counts
    live: int = field(init=False)  # bytes of these

    def __post_init__(self) -> None:
        self.live = sum(_nbytes(schema) for schema, _ in self.places.values())

    def read(self, client: int, only: str | None = None) -> dict[str, Tensor]:
        """The state of ``client``, or only its tensor of that name.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        held = zip(*self.places[client], strict=True)
        try:
            with self.path.open("rb") as file:
                return {k.name: _tensor(file, k, at) for k, at in held if only is None or k.name == only}
        except OSError as e:
            raise CheckpointError(
                f"client states: {self.path} cannot be read ({e}); resume=never starts afresh"
            ) from e

    def drop(self, client: int) -> None:
        """The state of ``client`` in this file no longer counts."""
        self.live -= _nbytes(self.places.pop(client)[0])

    def only(self, clients: set[int]) -> None:
        """Nothing counts but the states of ``clients``; those that are not in the file have empty ones."""
        self.places = {c: self.places.get(c, ((), ())) for c in sorted(clients)}
        self.__post_init__()


def schema_of(state: State) -> Schema:
    """The kinds of the tensors of a state, in its order.

    Raises:
        CheckpointError: for a dtype that the file format does not know.
    """
    for name, tensor in state.items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(
                f"client states: '{name}' is {tensor.dtype}, which cannot be written; use one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in NAMES)}"
            )
    return tuple(Kind(name, NAMES[t.dtype], tuple(t.shape)) for name, t in state.items())


def write(path: Path, schemas: Mapping[int, Schema], tensor: Callable[[int, str], Tensor]) -> Segment:
    """A new file with the states of all clients in ``schemas``; ``tensor(client, name)`` gives their content in turn.

    It appears by one rename. Tensors of wide dtypes come first, so that all are aligned.
    """
    order = [(client, i, kind) for client, schema in schemas.items() for i, kind in enumerate(schema)]
    order.sort(key=lambda item: -DTYPES[item[2].dtype].itemsize)
    header, at = dict[str, object](), 0
    begins: dict[int, list[int]] = {client: [0] * len(schema) for client, schema in schemas.items()}
    for client, i, kind in order:
        begins[client][i] = at
        header[f"{client}/{kind.name}"] = {
            "dtype": kind.dtype,
            "shape": kind.shape,
            "data_offsets": (at, at + kind.nbytes),
        }
        at += kind.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    head = len(text).to_bytes(8, "little") + text
    contents = (_content(tensor(client, kind.name)) for client, _, kind in order)
    checksum = _put(path, chain([head], contents), len(head) + at)
    places = {c: (schema, tuple(len(head) + b for b in begins[c])) for c, schema in schemas.items()}
    return Segment(path, checksum, at, places)


def _put(path: Path, parts: Iterable[Any], size: int) -> str:
    """Write ``parts``, ``size`` bytes in all, to ``path``, which appears by one rename; their sha256.

    Raises:
        OSError: saying how many bytes were wanted; what was written is removed, so that its room is free again.
    """
    digest, temporary = hashlib.sha256(), path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
        temporary.rename(path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(e.errno, f"{e.strerror or e}; it wanted {size:,} bytes", str(path)) from e
    return digest.hexdigest()


def check_name(name: str) -> None:
    """Refuse what an index calls a segment but is a path: it would be read, copied or deleted elsewhere.

    Raises:
        CheckpointError: naming it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            f"client states: {name!r:.80} is no file of a checkpoint; resume=never starts afresh"
        )


def opened(path: Path, checksum: str | None, schemas: dict[Schema, Schema]) -> Segment:
    """A file written before, by this module or by the library. Equal schemas become one object, kept in ``schemas``.

    Raises:
        CheckpointError: if it is missing or not what ``checksum`` (sha256) says.
    """
    afresh = "resume=never starts afresh"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != checksum:
                raise CheckpointError(f"client states: {path} does not match its checksum; {afresh}")
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"client states: {path} is missing; {afresh}") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"client states: {path} cannot be read ({e}); {afresh}") from e
    parts: dict[int, list[tuple[Kind, int]]] = {}
    header.pop("__metadata__", None)
    for key, about in header.items():
        client, name = key.split("/", 1)
        kind = Kind(name, about["dtype"], tuple(about["shape"]))
        parts.setdefault(int(client), []).append((kind, 8 + length + about["data_offsets"][0]))
    places = dict[int, Place]()
    for client, held in parts.items():
        schema = tuple(kind for kind, _ in held)
        places[client] = schemas.setdefault(schema, schema), tuple(at for _, at in held)
    return Segment(path, found, sum(_nbytes(schema) for schema, _ in places.values()), places)


def _nbytes(schema: Schema) -> int:
    return sum(kind.nbytes for kind in schema)


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tensor(file: BufferedReader, kind: Kind, at: int) -> Tensor:
    out = torch.empty(kind.shape, dtype=DTYPES[kind.dtype])
    file.seek(at)
    if (came := file.readinto(_content(out))) != kind.nbytes:
        raise OSError(f"it ends {kind.nbytes - came} bytes too early")
    return out
