"""Counts, sums and sums of squares per channel or column, exactly: they pool to the same whoever holds which samples.

Floats are whole numbers times powers of two, so their sums are such numbers too. Only the mean and the deviation are
rounded, once, at the end.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fedsim.data.dataset import Normalize

BLOCK = 1 << 22  # values that are looked at in one go
HALF, MASK = 27, (1 << 27) - 1
LONGEST = 2000  # digits of a number that is read


@dataclass(frozen=True)
class Moments:
    """Of ``count`` values in each of C channels or columns: their sums (C,) and sums of squares (C,)."""

    count: int
    total: tuple[Fraction, ...]
    squares: tuple[Fraction, ...]

    @staticmethod
    def of(x: Tensor, rows: np.ndarray) -> Moments:
        """Of samples ``rows`` of ``x``: a table (n, C), or channels (n, C, ...); finite numbers of any type."""
        width, each = x.shape[1], max(1, math.prod(x.shape[2:]))
        total, squares = [Fraction(0)] * width, [Fraction(0)] * width
        step = max(1, BLOCK // (each * width))
        for start in range(0, len(rows), step):
            block = x.index_select(0, torch.from_numpy(rows[start : start + step])).detach().cpu()
            for c in range(width):
                one, two = _sums(block[:, c].reshape(-1).numpy())
                total[c], squares[c] = total[c] + one, squares[c] + two
        return Moments(len(rows) * each, tuple(total), tuple(squares))

    def __add__(self, other: Moments) -> Moments:
        pairs = zip(self.total, other.total, strict=True), zip(self.squares, other.squares, strict=True)
        total, squares = (tuple(a + b for a, b in pair) for pair in pairs)
        return Moments(self.count + other.count, total, squares)

    def normalize(self, levels: int = 1) -> Normalize:
        """Mean 0 and deviation 1 of values divided by ``levels`` (255 for bytes); constants are only shifted."""
        n, scale = self.count, 1.0 if levels == 1 else 1 / levels
        if not n:
            return Normalize(scale=scale)
        mean = [t / n for t in self.total]
        spread = [s / n - m * m for s, m in zip(self.squares, mean, strict=True)]
        return Normalize(
            scale=scale,
            mean=tuple(float(m / levels) for m in mean),
            std=tuple(math.sqrt(v / levels**2) or 1.0 for v in spread),
        )

    def text(self) -> str:
        """As JSON: the count, and numbers as numerator and denominator."""
        return json.dumps([self.count, list(map(str, self.total)), list(map(str, self.squares))])

    @staticmethod
    def read(text: str) -> Moments:
        """The inverse of :meth:`text`.

        Raises:
            ValueError: it is no such text, or its numbers can be those of no values.
        """
        count, total, squares = json.loads(text)
        if type(count) is not int or count < 0 or len(total) != len(squares):
            raise ValueError("no count")
        found = Moments(count, tuple(map(_fraction, total)), tuple(map(_fraction, squares)))
        for one, two in zip(found.total, found.squares, strict=True):
            if two < 0 or one * one > count * two:
                raise ValueError("sums that no values have")
        return found


def _fraction(text: str) -> Fraction:
    above, _, below = text.partition("/")
    if max(len(above), len(below)) > LONGEST or int(below or 1) < 1:
        raise ValueError("no number")
    return Fraction(int(above), int(below or 1))


def _sums(values: np.ndarray) -> tuple[Fraction, Fraction]:
    """Sum and sum of squares of finite ``values`` (n,)."""
    if values.dtype == np.uint8:
        counts = [int(k) for k in np.bincount(values, minlength=256)]
        one = sum(v * k for v, k in enumerate(counts))
        return Fraction(one), Fraction(sum(v * v * k for v, k in enumerate(counts)))
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(fractions, 53).astype(np.int64)  # exact: a float has 53 digits
    total, squares = Fraction(0), Fraction(0)
    for e in np.unique(exponents).tolist():
        part = whole[exponents == e]
        high, low = part >> HALF, part & MASK  # part = high * 2^27 + low
        unit = Fraction(2) ** (e - 53)
        total += _whole_sum(part) * unit
        two = _whole_sum(high * high) << (2 * HALF)
        two += (_whole_sum(high * low) << (HALF + 1)) + _whole_sum(low * low)
        squares += two * unit * unit
    return total, squares


def _whole_sum(values: np.ndarray) -> int:
    """Sum of int64 (n,), without overflow for any n below 2^27."""
    return (int((values >> HALF).sum()) << HALF) + int((values & MASK).sum())
