"""Low-rank frames: one step of the power iteration for each matrix of the layout (PowerSGD, Vogels et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from fedsim.errors import ArgumentError
from fedsim.exchange.codecs.codec import (
    CodecDraws,
    FrameCodec,
    Shapes,
    Vector,
    as_vector,
    check_header,
    check_length,
)
from fedsim.exchange.codecs.framing import HEADER, NAMES, FrameHeader, float32_bytes, read_float32


def orthonormal(A: ArrayLike) -> Vector:
    """Columns of A (rows, r) made orthonormal by Gram and Schmidt, twice; those that the ones before span are zero."""
    P = np.array(A, dtype=np.float64)
    for i in range(P.shape[1]):
        before = math.sqrt(float(np.sum(P[:, i] ** 2)))
        for _ in range(2):
            for j in range(i):
                P[:, i] -= np.sum(P[:, j] * P[:, i]) * P[:, j]
        length = math.sqrt(float(np.sum(P[:, i] ** 2)))
        P[:, i] = P[:, i] / length if length > 1e-12 * before else 0.0
    return P


def low_rank(M: ArrayLike, Q: ArrayLike) -> tuple[Vector, Vector]:
    """P = orth(M Q) (rows, r) and Q' = M'P (cols, r) of a matrix M (rows, cols); ``Q`` (cols, r) is drawn."""
    matrix = np.asarray(M, dtype=np.float64)
    P = orthonormal(_product(matrix, np.asarray(Q, dtype=np.float64)))
    return P, _product(matrix.T, P)


def low_rank_decoded(P: ArrayLike, Q: ArrayLike) -> Vector:
    """P Q'^T (rows, cols), added up column by column: the same bits anywhere."""
    left, right = np.asarray(P, dtype=np.float64), np.asarray(Q, dtype=np.float64)
    out = np.zeros((len(left), len(right)))
    for p, q in zip(left.T, right.T, strict=True):
        out += p[:, None] * q[None, :]
    return out


class TensorPart(NamedTuple):
    """One tensor of a vector: entries [start, stop), and its matrix (0, 0 if it goes as it is)."""

    start: int
    stop: int
    rows: int
    cols: int


@dataclass(frozen=True)
class LowRank(FrameCodec):
    """P and Q' of each matrix of the layout (first axis: rows) where they are shorter, the rest in float32.

    A vector that is no model's, or whose tensors are all small, is then no shorter and goes as float32.
    """

    rank: int = 2
    id: ClassVar[int] = NAMES.index("low_rank")
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ArgumentError(f"compression.rank={self.rank}: must be at least 1")

    def size(self, d: int, layout: Shapes = ()) -> int:
        """Bytes of a frame, header included."""
        parts = list(self._parts(d, layout))
        return HEADER + 4 * sum(self.rank * (p.rows + p.cols) if p.rows else p.stop - p.start for p in parts)

    def encode(self, v: ArrayLike, draws: CodecDraws, layout: Shapes = ()) -> bytes:
        """The frame of ``v`` (d,)."""
        vector, matrices, rest = as_vector(v), list[Vector](), list[Vector]()
        for number, part in enumerate(self._parts(len(vector), layout)):
            piece = vector[part.start : part.stop]
            if part.rows:
                Q = draws.normals(number, (part.cols, self.rank))
                matrices += [x.ravel() for x in low_rank(piece.reshape(part.rows, part.cols), Q)]
            else:
                rest.append(piece)
        head = FrameHeader(self.id, 32, len(vector))
        return head.pack() + float32_bytes(np.concatenate([*matrices, *rest]))

    def body(self, head: FrameHeader, body: bytes, draws: CodecDraws, layout: Shapes) -> Vector:
        """The vector of a body."""
        check_header(head, FrameHeader(self.id, 32, head.d))
        check_length(body, self.size(head.d, layout) - HEADER)
        numbers, out, at = read_float32(body, len(body) // 4), np.empty(head.d), 0
        parts = list(self._parts(head.d, layout))
        for part in parts:
            if part.rows:
                middle, end = at + part.rows * self.rank, at + (part.rows + part.cols) * self.rank
                P, Q = numbers[at:middle].reshape(-1, self.rank), numbers[middle:end].reshape(-1, self.rank)
                out[part.start : part.stop] = low_rank_decoded(P, Q).ravel()
                at = end
        for part in parts:
            if not part.rows:
                out[part.start : part.stop] = numbers[at : at + part.stop - part.start]
                at += part.stop - part.start
        return out

    def lengths(self, head: FrameHeader, size: int, layout: Shapes) -> Sequence[slice]:
        """Q' of each matrix, and the rest; P stays."""
        out, at = list[slice](), 0
        for part in self._parts(head.d, layout):
            if part.rows:
                middle, at = at + 4 * part.rows * self.rank, at + 4 * (part.rows + part.cols) * self.rank
                out.append(slice(middle, at))
        return [*out, slice(at, size)]

    def _parts(self, d: int, layout: Shapes) -> Iterator[TensorPart]:
        """The tensors of a vector (d,); one that the layout does not describe is one tensor without rows."""
        sizes = [math.prod(shape) for shape in layout]
        if sum(sizes) != d:
            yield TensorPart(0, d, 0, 0)
            return
        start = 0
        for shape, size in zip(layout, sizes, strict=True):
            rows = shape[0] if len(shape) > 1 else 0
            cols = size // rows if rows else 0
            shorter = self.rank * (rows + cols) < size
            yield TensorPart(start, start + size, *((rows, cols) if rows and shorter else (0, 0)))
            start += size


def _product(a: Vector, b: Vector) -> Vector:
    """a b by torch, whose number of threads the run fixes."""
    return np.asarray(
        (torch.from_numpy(np.ascontiguousarray(a)) @ torch.from_numpy(np.ascontiguousarray(b))).numpy()
    )
