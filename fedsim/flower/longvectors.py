"""Long vectors travel in parts, so that neither side ever needs the whole of one twice.

Flower makes several copies of an array on its way: of the pieces as they arrive, of all of them joined. Of a part these
are small. Whoever sends lends the vector's own memory, padding left out (``fedsim.flower.pieces``);
whoever receives puts one after the other into place and lets it go. A vector of up to one part travels as it always
did. The first part stands under the vector's name in the record, the others under ``+``, their number and the name.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.flower.headers import DTYPES, Header, header, tensor
from fedsim.flower.pieces import array_of
from fedsim.task.slots import Slots

FLOWERS = 5 << 20  # bytes of the pieces that Flower cuts an array into
HEAD = 128  # bytes before the numbers of a plain array
PART = 3 * FLOWERS - HEAD  # bytes of numbers in a part: whole pieces
MOST_PARTS = 10_000
NEXT = "+"  # before the number of a further part


def in_parts(key: str, name: str, vector: Tensor, slots: Slots | None) -> dict[str, Array]:
    """``vector``, 1-D, under ``key``, which ends with ``name``; its padding, as of ``slots``, is left out."""
    pieces = [vector] if slots is None else list(slots.pieces(vector))
    each = max(PART // vector.element_size(), -(-len(vector) // MOST_PARTS))
    found, numbers, held = dict[str, Array](), list[Tensor](), 0
    for piece in pieces:
        while len(piece):
            some = piece[: each - held]
            numbers.append(some)
            held, piece = held + len(some), piece[len(some) :]
            if held == each:
                found[_key(len(found), key, name)] = array_of(numbers, (held,))
                numbers, held = [], 0
    if numbers or not found:
        numbers = numbers or [vector[:0]]
        found[_key(len(found), key, name)] = array_of(numbers, (held,))
    return found


def is_long(vector: Tensor) -> bool:
    """Whether it travels in parts."""
    return vector.dim() == 1 and vector.numel() * vector.element_size() > PART


@dataclass
class Arrived:
    """An array as it came: in one part, or in several, each with its header."""

    name: str
    kind: str  # how it was packed
    parts: list[Array]
    headers: list[Header]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        first = self.headers[0].shape
        return first if len(self.parts) == 1 else (sum(h.shape[0] for h in self.headers),)

    @property
    def dtype(self) -> torch.dtype:
        """Of all parts."""
        found: torch.dtype = DTYPES[self.headers[0].dtype.name]
        return found

    def taken(self) -> Iterator[Tensor]:
        """The numbers part by part, as views; each is gone once the next is asked for."""
        while self.parts:
            yield tensor(self.parts.pop(0), self.headers.pop(0))

    def whole(self, slots: Slots | None) -> Tensor:
        """All of it, of several parts once: joined, with padding as ``slots`` say.

        What is long is memory of its own; other arrays may be views of what arrived.
        """
        if len(self.parts) == 1:
            one = next(self.taken())
            whole = one if slots is None else slots.expand(one)
            return whole.clone() if whole is one and is_long(one) else whole
        shape, dtype = self.shape, self.dtype
        if slots is not None:
            return slots.filled(self.taken(), dtype)
        out, at = torch.empty(shape, dtype=dtype), 0
        for part in self.taken():
            out[at : at + len(part)] = part
            at += len(part)
        return out


def arrived(record: MutableMapping[str, Any], most: int = MOST_PARTS) -> list[Arrived]:
    """What the record holds, which is empty of parts afterwards, so that each can go once it was used.

    Raises:
        ClientError: naming an array whose bytes are none, or whose parts do not follow one another.
    """
    found, names = list[Arrived](), dict[str, Arrived]()
    for key, array in record.items():
        number, name = _number(key)
        if not name or (number == 0 and name in names):
            raise ClientError(f"array {key!r:.80}: no name, or twice the same")
        about = header(name, array)
        if number == 0:
            names[name] = Arrived(name, key[:1], [array], [about])
            found.append(names[name])
        else:
            _further(names.get(name), number, array, about, name)
    if len(found) > most:
        raise ClientError("the update has no values, or too many entries")
    for key in [k for k in record if k[:1] == NEXT]:
        del record[key]
    for one in found:
        if len(one.parts) > 1:
            del record[one.kind + one.name]
    return found


def _further(first: Arrived | None, number: int, array: Array, about: Header, name: str) -> None:
    if first is None or number != len(first.parts):
        raise ClientError(f"array '{name}': part {number} follows none")
    if len(about.shape) != 1 or len(first.headers[0].shape) != 1 or about.dtype != first.headers[0].dtype:
        raise ClientError(
            f"array '{name}': part {number} is {about.dtype.name} {about.shape}, unlike the first"
        )
    first.parts.append(array)
    first.headers.append(about)


def _key(number: int, key: str, name: str) -> str:
    return f"{NEXT}{number:05d}{name}" if number else key


def _number(key: str) -> tuple[int, str]:
    """Which part a key stands for, and of which array."""
    if key[:1] != NEXT:
        return 0, key[1:]
    digits = key[1:6]
    if len(digits) != 5 or not (digits.isascii() and digits.isdigit()) or not int(digits):
        raise ClientError(f"array {key!r:.80}: no name, or twice the same")
    return int(digits), key[6:]
