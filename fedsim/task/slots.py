"""One flat vector: where each of its tensors lies, and what is padding.

Every tensor starts at a multiple of 64 bytes, and the vector's length is one too, so that the rows of a stack (n, d)
are aligned as well. What lies between is padding: zeros, which are no part of the model. They are never hashed, sent,
noised or drawn; ``compact`` leaves them out and ``expand`` puts them back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ConfigError

FEW = 256  # numbers that Python looks at sooner than torch
ALIGNMENT = 64  # bytes: a cache line, the widest vector registers, and where torch's allocations start


@dataclass(frozen=True)
class Slot:
    """One tensor inside a flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def span(self) -> slice:
        """Where the tensor lies in the vector."""
        return slice(self.offset, self.offset + self.numel)


class Slots(Sequence[Slot]):
    """The tensors of a flat vector in order.

    ``dim`` is the vector's length with its padding, ``size`` the number of real entries, ``runs`` where these lie
    (neighbours without padding between them joined), ``gaps`` (dim - size,) the places of the padding.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], step: int, what: str):
        """``step``: entries that offsets are multiples of; ``what`` the tensors are called in errors."""
        self._slots, self.runs, self._what = list[Slot](), list[slice](), what
        offset, gaps = 0, list[Tensor]()
        for name, t in tensors:
            slot = Slot(name, tuple(t.shape), offset, t.numel())
            self._slots.append(slot)
            end = slot.span.stop
            if self.runs and self.runs[-1].stop == offset:
                self.runs[-1] = slice(self.runs[-1].start, end)
            elif slot.numel:
                self.runs.append(slot.span)
            offset = -(-end // step) * step
            gaps.append(torch.arange(end, offset))
        self.dim, self.size = offset, sum(s.numel for s in self._slots)
        self.gaps = torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.int64)
        self._there: Tensor | None = None  # the same on a GPU

    def part(self, names: Collection[str]) -> Slots:
        """Vectors of the same length of which only the tensors called ``names`` are not zero: all else counts as
        padding."""
        out = copy.copy(self)
        out._slots = [s for s in self if s.name in names]
        out.size, out.runs = sum(s.numel for s in out), list[slice]()
        mine = torch.zeros(self.dim, dtype=torch.bool)
        for slot in out:
            if slot.numel:
                mine[slot.span] = True
                if out.runs and out.runs[-1].stop == slot.offset:
                    out.runs[-1] = slice(out.runs[-1].start, slot.span.stop)
                else:
                    out.runs.append(slot.span)
        out.gaps = torch.nonzero(~mine).flatten()
        return out

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, i: Any) -> Any:
        return self._slots[i]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return self.dim > self.size

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Views of ``v`` (..., dim) by name, shape (..., *tensor shape)."""
        return {s.name: v[..., s.span].view((*v.shape[:-1], *s.shape)) for s in self}

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors by name to one vector (dim,), on the first one's device.

        Raises:
            ConfigError: naming a tensor that is missing or misshapen.
        """
        parts = []
        for slot in self:
            if slot.name not in tensors:
                given = ", ".join(tensors) or "nothing"
                raise ConfigError(f"{self._what} '{slot.name}' is missing; given: {given}")
            t = torch.as_tensor(tensors[slot.name]).detach()
            if tuple(t.shape) != slot.shape:
                raise ConfigError(
                    f"{self._what} '{slot.name}' has shape {tuple(t.shape)}, expected {slot.shape}"
                )
            parts.append(t.reshape(-1))
        out = torch.zeros(self.dim, dtype=dtype, device=parts[0].device if parts else "cpu")
        for slot, part in zip(self, parts, strict=True):
            out[slot.span] = part
        return out

    def compact(self, v: Tensor) -> Tensor:
        """``v`` (..., dim) without its padding, (..., size): a copy, or ``v`` itself where there is none."""
        return torch.cat([v[..., run] for run in self.runs], dim=-1) if self.padded else v

    def expand(self, v: Tensor) -> Tensor:
        """``v`` (..., size) with zeros as padding, (..., dim): a copy, or ``v`` itself where there is none."""
        if not self.padded:
            return v
        out, start = v.new_zeros((*v.shape[:-1], self.dim)), 0
        for run in self.runs:
            stop = start + run.stop - run.start
            out[..., run] = v[..., start:stop]
            start = stop
        return out

    def add(self, v: Tensor, part: Tensor) -> None:
        """Add ``part`` (size,) to the real entries of ``v`` (dim,), in its place."""
        start = 0
        for run in self.runs:
            stop = start + run.stop - run.start
            v[run] += part[start:stop]
            start = stop

    def filled(self, parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """``expand(torch.cat(parts))`` of ``size`` numbers, (dim,), in memory for one vector and one part."""
        out, runs, at, stop = torch.empty(self.dim, dtype=dtype), iter(self.runs), 0, 0
        out[self.gaps] = 0  # the rest takes memory as it is filled
        for part in parts:
            while len(part):
                if at == stop:
                    run = next(runs)
                    at, stop = run.start, run.stop
                count = min(len(part), stop - at)
                out[at : at + count] = part[:count]
                part, at = part[count:], at + count
        return out

    def pieces(self, v: Tensor) -> Iterator[Tensor]:
        """The real entries of ``v`` (..., dim) row by row, in order, as views: those of ``compact(v)``."""
        for row in v.reshape(-1, self.dim) if self.dim else ():
            for run in self.runs:
                yield row[run]

    def holds(self, v: Tensor) -> bool:
        """Whether ``v`` is a vector, or a stack of vectors, of these tensors: that long, and its padding all zero."""
        if not v.dim() or v.shape[-1] != self.dim:
            return False
        if not self.padded:
            return True
        if v.is_cpu:
            gap = v.index_select(-1, self.gaps)
            if gap.dim() == 1 and len(gap) < FEW:
                return not any(gap.tolist())
            return torch.equal(gap, torch.zeros_like(gap))
        if self._there is None or self._there.device != v.device:
            self._there = self.gaps.to(v.device)
        return not bool(v.index_select(-1, self._there).any())


def finite(t: Tensor) -> bool:
    """Whether all entries are finite, in one pass without a temporary."""
    if t.is_complex():
        t = torch.view_as_real(t)
    if not t.is_floating_point():
        return True
    return math.isfinite(t.sum(dtype=torch.float32 if t.dtype == torch.float16 else None).item())
