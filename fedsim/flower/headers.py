"""Arrays that came from another machine: what they are is read from their header, before anything is made of them.

Nothing is unpickled, and no memory is taken by a size that is only stated: the numbers are a view of the bytes that
arrived.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.flower.pieces import PieceArray

HEADER = 1024  # bytes of a header, at most; those of plain arrays have 128
DIMENSIONS = 8
DTYPES = {  # those that torch has too
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """Shape and type of an array, and where in the bytes its numbers begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def numel(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)


def header(name: str, array: Array) -> Header:
    """What the bytes of ``array`` hold.

    Raises:
        ClientError: naming the array, if that is no plain array of numbers, or not what its record says, or if there
            are more or fewer bytes than its shape needs.
    """
    if array.stype != "numpy.ndarray":
        raise ClientError(f"array '{name}': serialised as {array.stype!r:.40}, expected 'numpy.ndarray'")
    apart = array if isinstance(array, PieceArray) else None
    found = _parsed(name, apart.start(HEADER + 16) if apart else array.data[: HEADER + 16])
    if (tuple(array.shape), array.dtype) != (found.shape, found.dtype.name):
        raise ClientError(
            f"array '{name}': its record says {array.dtype!r:.40} {_few(array.shape)}, its bytes say "
            f"{found.dtype.name} {_few(found.shape)}"
        )
    needed = found.numel * found.dtype.itemsize
    here = (apart.nbytes if apart else len(array.data)) - found.offset
    if needed != here:
        raise ClientError(
            f"array '{name}': {_few(found.shape)} of {found.dtype.name} are {needed} bytes, but {here} arrived"
        )
    return found


def tensor(array: Array, about: Header) -> Tensor:
    """The numbers of ``array``, a view of its bytes (in pieces: of these joined); not to be written to."""
    if not about.numel:
        return torch.empty(about.shape, dtype=DTYPES[about.dtype.name])
    flat = np.frombuffer(array.data, about.dtype, about.numel, about.offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
        return torch.from_numpy(flat.reshape(about.shape))


def _parsed(name: str, data: bytes) -> Header:
    file = io.BytesIO(data)
    try:
        read = READERS[np.lib.format.read_magic(file)]
        shape, by_columns, dtype = read(file, max_header_size=HEADER)
    except Exception as error:  # whatever NumPy's parser says of bytes that somebody made up
        raise ClientError(
            f"array '{name}': its bytes are no array ({type(error).__name__}: {error!s:.80})"
        ) from None
    plain = dtype.names is None and dtype.subdtype is None and dtype.isnative and dtype.name in DTYPES
    if not plain or by_columns:
        raise ClientError(
            f"array '{name}': {dtype!s:.40}{' by columns' if by_columns else ''} is not accepted; expected numbers, "
            f"row by row, of a type among {', '.join(DTYPES)}"
        )
    if len(shape) > DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ClientError(f"array '{name}': {_few(shape)} is no shape")
    return Header(shape, dtype, file.tell())


def _few(shape: object) -> str:
    return f"{tuple(shape)!s:.80}" if isinstance(shape, tuple | list) else "?"
