"""The updates of a round as ``n`` rows of ``d`` numbers, whatever holds them, read piece by piece in float64."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError, TooFewUpdates

PIECE = 1 << 18  # numbers read at once (2 MiB of float64, which stays in a core's cache)
WIDE = 1 << 22  # where they are looked at in their place
LONG = 1 << 15  # columns read at once of a few rows, where rows are only added up
Report = dict[str, Any]  # diagnostics that a rule fills in on request
NEEDED = {  # rule, or rule and variant: (slope, offset), where it needs slope f + offset updates
    "trimmed_mean": (2, 1),
    "meamed": (2, 1),
    "phocas": (2, 1),
    "krum": (2, 3),
    "multi_krum": (2, 3),
    "krum variant=byzfl": (2, 1),
    "multi_krum variant=byzfl": (2, 1),
    "bulyan": (4, 3),
    "mda": (2, 1),
    "smea": (2, 1),
    "caf": (2, 1),
    "monna": (2, 1),
    "nnm": (1, 1),
    "arc": (1, 1),
}


class RuleError(ConfigError, ValueError):
    """Updates or options that a rule cannot work with."""


class TooFewError(RuleError, TooFewUpdates):
    """Fewer finite updates than the rule needs."""


@dataclass(frozen=True)
class Rows:
    """``n`` vectors: a matrix, a memory map or a list of vectors; tensors or arrays. Nothing is copied as a whole.

    ``index`` are the positions in use, ascending; ``weights`` (n,) float64 belong to them. After a pre-aggregator (see
    ``before``) a row is a combination of those in use: ``mix`` (r, n) float64 says which, r is then the number of rows.
    """

    source: Tensor | np.ndarray | list[Tensor | np.ndarray]
    dim: int
    index: Sequence[int]
    weights: Tensor
    total: int  # rows given
    dtype: torch.dtype
    device: torch.device
    numpy: bool
    mix: Tensor | None = None
    products: Tensor | None = None  # inner products (r, r) of the rows, where they are known
    sizes: Tensor | None = None  # norms (r,) of the rows, where they are known
    first: Tensor | None = None  # norms of the rows in use as they came, kept once something is done to them
    owners: Sequence[Sequence[int]] | None = None  # positions that a row stands for, where that is not one

    @staticmethod
    def of(rule: str, updates: Any, weights: Any = None) -> Rows:
        """Check and wrap ``updates`` (n, d) and ``weights`` (n,), equal by default.

        Raises:
            RuleError: no rows, not two axes, unequal lengths, or weights that are no weights.
        """
        source = updates
        if isinstance(updates, list | tuple):
            source = [r if isinstance(r, Tensor | np.ndarray) else torch.as_tensor(r) for r in updates]
            shapes = {tuple(r.shape) for r in source}
            if len(shapes) > 1 or any(len(s) != 1 for s in shapes):
                raise RuleError(f"{rule}: a list of updates holds vectors of one length, got shapes {shapes}")
        elif not isinstance(updates, Tensor | np.ndarray) or updates.ndim != 2:
            got = f"shape {tuple(updates.shape)}" if hasattr(updates, "shape") else type(updates).__name__
            raise RuleError(f"{rule}: expected updates of shape (n, d) or a list of vectors, got {got}")
        n = len(source)
        if n == 0:
            raise RuleError(f"{rule} of no updates; expected at least one row")
        first = source[0]
        kind = torch.empty(0, dtype=first.dtype) if isinstance(first, Tensor) else _tensor(first[:0])
        return Rows(
            source=source,
            dim=len(first),
            index=range(n),
            weights=_weights(rule, weights, n),
            total=n,
            dtype=kind.dtype if kind.is_floating_point() else torch.float64,
            device=first.device if isinstance(first, Tensor) else torch.device("cpu"),
            numpy=isinstance(first, np.ndarray),
        )

    def __len__(self) -> int:
        return len(self.index) if self.mix is None else len(self.mix)

    @property
    def unmixed(self) -> Rows:
        """The rows as they were given."""
        equal = torch.ones(len(self.index), dtype=torch.float64)
        return replace(self, weights=equal, mix=None, products=None, sizes=None, owners=None)

    def mixed(self, by: Tensor, owners: Sequence[Sequence[int]] | None = None, **known: Any) -> Rows:
        """The combinations ``by`` (r, n) of these rows, equally weighted where ``owners`` are given."""
        products = None if self.products is None else by @ self.products @ by.T
        if products is not None:
            products = (products + products.T) / 2  # symmetric to the bit, as those of rows are
        weights = (
            self.weights if owners is None else torch.stack([by[i] @ self.weights for i in range(len(by))])
        )
        mix = by if self.mix is None else by @ self.mix
        found = {"products": products, "sizes": None, "owners": owners or self.owners} | known
        return replace(self, mix=mix, weights=weights, **found)

    def names(self, chosen: Sequence[int]) -> list[int]:
        """Positions of the rows given for which the rows at ``chosen`` stand, ascending."""
        return sorted(p for i in chosen for p in ([self.index[i]] if self.owners is None else self.owners[i]))

    @property
    def dropped(self) -> list[int]:
        """Positions of rows left out."""
        return sorted(set(range(self.total)) - set(self.index))

    def keep(self, chosen: Sequence[int]) -> Rows:
        """Only the rows at ``chosen`` positions among those in use."""
        at = list(chosen)
        if self.mix is not None:
            owners = None if self.owners is None else [self.owners[i] for i in at]
            mixed = replace(self, mix=self.mix[at], weights=self.weights[at], products=None, sizes=None)
            return replace(mixed, owners=owners or [[self.index[i]] for i in at])
        picked = [self.index[i] for i in at]
        return replace(self, index=picked, weights=self.weights[at], products=None, sizes=None)

    def spans(self, piece: int = PIECE) -> Iterator[tuple[int, int]]:
        """Borders of the pieces of ``piece`` numbers; they depend on the shape alone."""
        step = max(1, piece // max(1, len(self.index)))
        for start in range(0, self.dim, step):
            yield start, min(start + step, self.dim)

    def read(self, start: int, stop: int) -> Tensor:
        """Columns ``[start, stop)`` of the rows in use, a fresh ``(n, stop - start)`` in float64."""
        given = self._given(start, stop)
        return given if self.mix is None else self.mix.to(self.device) @ given

    def _given(self, start: int, stop: int, at: slice = slice(None), room: Tensor | None = None) -> Tensor:
        """Those of the rows in use ``at`` these positions, as they were given; in ``room``, else in new memory."""
        index = self.index[at]
        size = len(index) * (stop - start)
        out = (self._room(size) if room is None else room[:size]).view(len(index), stop - start)
        if isinstance(self.source, list):
            for row, i in zip(out, index, strict=True):
                row.copy_(_tensor(self.source[i][start:stop]))
            return out
        rows = at if len(self.index) == self.total else list(index)
        return out.copy_(_tensor(self.source[rows, start:stop]))

    def _room(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float64, device=self.device)

    def matrix(self) -> Any:
        """All rows (n, d), in the updates' type, kind and place."""
        out = torch.empty(len(self), self.dim, dtype=self.dtype, device=self.device)
        for start, stop in self.spans():
            out[:, start:stop] = self.read(start, stop)
        return out.numpy() if self.numpy else out

    def fill(self, pieces: Iterator[Tensor]) -> Any:
        """The result (d,) from its pieces in the order of ``spans``, in the updates' type, kind and place."""
        out = torch.empty(self.dim, dtype=self.dtype, device=self.device)
        for (start, stop), piece in zip(self.spans(), pieces, strict=True):
            out[start:stop] = piece
        return out.numpy() if self.numpy else out

    def zeros(self) -> Any:
        """No update: zeros (d,)."""
        return self.fill(torch.zeros(b - a) for a, b in self.spans())

    def combine(self, coefficients: Tensor) -> Any:
        """``sum_i coefficients_i u_i`` (d,), one pass; coefficients (n,) float64. Zeros do not read their rows."""
        if self.mix is not None:
            return self.unmixed.combine(coefficients @ self.mix)
        used = torch.nonzero(coefficients).flatten().tolist()
        return self.keep(used)._added(coefficients[used].to(self.device)) if used else self.zeros()

    def _added(self, c: Tensor) -> Any:
        """All rows by ``c`` (n,), one after the other: long stretches of a few in one room that stays in cache."""
        span = max(1, min(LONG, self.dim))
        few = max(1, PIECE // span)
        room = self._room(min(few, len(self)) * span)
        out = torch.empty(self.dim, dtype=self.dtype, device=self.device)
        for start in range(0, self.dim, span):
            stop = min(start + span, self.dim)
            total = torch.mv(self._given(start, stop, slice(few), room).T, c[:few])
            for i in range(few, len(self), few):
                total.addmv_(self._given(start, stop, slice(i, i + few), room).T, c[i : i + few])
            out[start:stop] = total
        return out.numpy() if self.numpy else out

    def single(self, start: int, stop: int) -> Tensor | None:
        """Columns ``[start, stop)`` of the rows in use as they lie there, (n, stop - start), if they are a float32
        matrix of which nothing is left out; not to be changed."""
        if isinstance(self.source, list) or self.mix is not None or len(self.index) < self.total:
            return None
        part = _tensor(self.source[:, start:stop])
        return part if part.dtype == torch.float32 and part.stride(1) == 1 else None

    def finite(self) -> list[int]:
        """Positions of rows whose entries are all finite; one pass, none where they were looked at before."""
        if self.mix is not None:
            return list(range(len(self)))
        good = torch.ones(len(self), dtype=torch.bool)
        for a, b in self.spans():
            good &= torch.isfinite(self.read(a, b)).all(dim=1).cpu()
        return torch.nonzero(good).flatten().tolist()

    def spread(self, values: Tensor) -> list[float]:
        """Values (n,) of the rows in use as a list over all rows given; 0 for those left out."""
        out = [0.0] * self.total
        for row, v in enumerate(values.tolist()):
            for i in self.names([row]):
                out[i] = v
        return out

    def shares(self, coefficients: Tensor) -> list[float]:
        """``coefficients`` (n,) of the rows in use as those of all rows given; 0 for those left out."""
        return self.spread(coefficients) if self.mix is None else self.unmixed.spread(coefficients @ self.mix)

    def without(self, rule: str, good: Sequence[int], report: Report | None) -> Rows:
        """Drop all but the ``good`` rows and say so: in ``report``, or by a warning if none was asked for."""
        out = self if len(good) == len(self) else self.keep(good)
        if report is not None:
            report["dropped"] = out.dropped
        elif len(out) < len(self):
            warnings.warn(f"{rule}: rows {out.dropped} are not finite and were left out", stacklevel=3)
        return out


def tolerated(rule: str, rows: Rows, f: Any, removed: Any = 0) -> int:
    """``f`` if the rule can bear it, ``n >= slope f + offset`` (see ``NEEDED``).

    Rows that were dropped as not finite, and ``removed`` ones that never came here for that reason, are among the f
    wrong ones: where they leave too few, f shrinks by as many.

    Raises:
        RuleError: f or ``removed`` is no count; a ``TooFewError``, with the inequality, if too few are left.
    """
    wrong = whole(rule, "f", f, 0, "the wrong updates to tolerate")
    before = whole(rule, "removed", removed, 0, "the updates left out before")
    slope, offset = NEEDED[rule]
    n, gone = len(rows), rows.total - len(rows.index) + before
    able = (n - offset) // slope
    if wrong > able and (able < 0 or wrong - gone > able):
        bound = f"{slope}f + {offset}"
        left = f" ({gone} more were not finite)" if gone else ""
        raise TooFewError(
            f"{rule}: f={wrong} needs n >= {bound} = {slope * wrong + offset} updates, got {n}{left}"
        )
    return min(wrong, able)


def whole(rule: str, key: str, value: Any, least: int, what: str) -> int:
    """``value`` as an ``int``, whatever integer type it has; refused below ``least``."""
    try:
        number = None if isinstance(value, bool) else int(operator.index(value))
    except TypeError:
        number = None
    if number is None or number < least:
        raise RuleError(f"{rule}: {key}={value!r} must be a whole number, at least {least}: {what}")
    return number


def choice(rule: str, key: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse an option that does not exist."""
    if value not in allowed:
        raise RuleError(f"{rule}: {key}={value!r}, choose one of {', '.join(allowed)}")


def _tensor(part: Tensor | np.ndarray) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach()
    own = part.flags.writeable and part.dtype.isnative and all(s >= 0 for s in part.strides)
    return torch.from_numpy(part if own else np.array(part, dtype=part.dtype.newbyteorder("=")))


def _weights(rule: str, weights: Any, n: int) -> Tensor:
    if weights is None:
        return torch.ones(n, dtype=torch.float64)
    w = torch.as_tensor(weights).to("cpu", torch.float64)
    if w.shape != (n,) or not bool(((w >= 0) & torch.isfinite(w)).all()) or not float(w.sum()) > 0:
        raise RuleError(
            f"{rule}: weights must be {n} non-negative numbers with a positive sum, got {w.tolist()}"
        )
    return w
