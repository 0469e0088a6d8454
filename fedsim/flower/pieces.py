"""Arrays of Flower's whose bytes lie in several places: what is sent is copied nowhere, what came is not joined.

Flower's own array holds all its bytes in one piece and sends views of them; of what arrives it joins copies, as often
as the sender says. Here the pieces are what is sent: views of the vector's own memory. Of what arrives, each piece is
kept as it came, so that one that is named a thousand times still takes memory once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from torch import Tensor

MOST = 5 << 20  # bytes of a piece, as Flower cuts them
SMALL = 1 << 18  # bytes of numbers that are put together with their neighbours
Piece = bytes | memoryview


class PieceArray(Array):
    """An array in pieces, each of up to ``MOST`` bytes where it is sent."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, pieces: Sequence[Piece]):
        self.dtype, self.shape, self.stype, self.pieces = dtype, shape, stype, tuple(pieces)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """All bytes, joined anew each time."""
        return b"".join(self.pieces)

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return sum(map(len, self.pieces))

    def start(self, count: int) -> bytes:
        """The first ``count`` bytes, or all."""
        found = bytearray()
        for piece in self.pieces:
            if len(found) >= count:
                break
            found += piece[: count - len(found)]
        return bytes(found)

    def slice_array(self) -> list[tuple[str, InflatableObject]]:
        """The pieces as Flower sends them, with the hash of each."""
        if "_chunks" not in self.__dict__:
            chunks = [ArrayChunk(memoryview(piece)) for piece in self.pieces]
            self.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
        found: list[tuple[str, InflatableObject]] = self.__dict__["_chunks"]
        return found

    @classmethod
    def inflate(
        cls, object_content: bytes, children: dict[str, InflatableObject] | None = None
    ) -> PieceArray:
        """What Flower makes an array of, its pieces left apart."""
        there: dict[str, Any] = dict(children or {})
        checked = Array.inflate(object_content, dict.fromkeys(there, ArrayChunk(memoryview(b""))))
        ids = get_object_children_ids_from_object_content(object_content)
        order = json.loads(get_object_body(object_content, Array))["arraychunk_ids"]
        return cls(checked.dtype, checked.shape, checked.stype, [there[ids[i]].data for i in order])


PieceArray.__qualname__ = Array.__qualname__  # it is one on the wire


def record_of(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of these very arrays; Flower's own constructor makes others of their joined bytes."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


class PiecesRecord(ArrayRecord):
    """Makes records of arrays in pieces."""

    @classmethod
    def inflate(
        cls, object_content: bytes, children: dict[str, InflatableObject] | None = None
    ) -> ArrayRecord:
        """A plain record, which holds the arrays themselves."""
        there: dict[str, Any] = dict(children or {})
        nothing = {key: Array("", (), "", b"") if isinstance(a, Array) else a for key, a in there.items()}
        ArrayRecord.inflate(object_content, nothing)  # to see whether it is one
        return record_of(
            {n: there[key] for n, key in json.loads(get_object_body(object_content, ArrayRecord)).items()}
        )


def leave_apart() -> None:
    """Arrays that this process receives from now on stay in pieces."""
    inflatable_class_registry[Array.__qualname__] = PieceArray
    inflatable_class_registry[ArrayRecord.__qualname__] = PiecesRecord


def array_of(numbers: Sequence[Tensor], shape: tuple[int, ...]) -> Array:
    """``numbers`` (1-D, of one type) end to end as an array of that ``shape``; the bytes of ``Array(numpy array)``.

    Long ones are not copied: they must not be written to before the array has been sent.
    """
    views = [n.contiguous().numpy() for n in numbers]
    dtype, head = views[0].dtype, io.BytesIO()
    about: Any = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, about)
    pieces, gathered = list[Piece](), bytearray(head.getvalue())
    for view in views:
        data = view.view(np.uint8).data
        if len(data) < SMALL and len(gathered) + len(data) <= MOST:
            gathered += data
            continue
        pieces += [bytes(gathered)] if gathered else []
        gathered = bytearray()
        pieces += [data[at : at + MOST] for at in range(0, len(data), MOST)]
    return PieceArray(str(dtype), shape, "numpy.ndarray", [*pieces, *([bytes(gathered)] if gathered else [])])
