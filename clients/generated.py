"""Rows generated from class geometry: which ones a client gets (algorithms 1 and 2 of GGEUR), and their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.geometry import ClassStatistics, Geometry
from clients.noise import KeyedNoise
from fedsim.data.local import Batch, LocalData

FILLS = ("paper", "pool", "scripts")
Noise = Callable[[int, Tensor, int], Tensor]  # (class, row numbers (k,), width) -> (k, width) normal numbers


@dataclass(frozen=True)
class RowPlan:
    """What is generated: for row g the class ``label[g]``, the point it lies around, and its number in the class.

    ``source[g]`` >= 0 is an own row of the class, -1 - q the prototype of domain q. ``kept`` are the own rows in use.
    """

    kept: Tensor
    label: Tensor
    source: Tensor
    number: Tensor

    def __len__(self) -> int:
        return len(self.label)


def plan_rows(
    y: Tensor,
    n: Tensor,
    *,
    target: int,
    present: Tensor | None = None,
    per_prototype: int = 0,
    fill: str = "paper",
    total: int = 0,
    rng: torch.Generator | None = None,
) -> RowPlan:
    """Plan the rows of one client with labels ``y`` (n,).

    Step 1: a class with own rows is filled up to ``target`` rows, spread over its rows as evenly as possible. Step 2:
    ``per_prototype`` rows around the prototype of every domain in ``present`` (Q, C) that has the class. Classes
    without geometry (``n[c] == 0``) get none.

    ``fill=pool``: of these rows a random choice (by ``rng``) fills the class up to ``total``; one with ``total`` own
    rows or more keeps that many of them and gets none; one without own rows takes the first ``total``. ``scripts`` does
    the same with ``target`` rows around own ones in the pool, however many own rows there are, as the authors' scripts.
    """
    kept, label, source = [], list[Tensor](), list[Tensor]()
    for c in torch.nonzero(n > 0).flatten().tolist():
        own = torch.nonzero(y == c).flatten()
        around = target if fill == "scripts" else max(0, target - len(own))
        step1 = own[torch.arange(around) % len(own)] if len(own) else own
        domains = torch.empty(0, dtype=torch.int64)
        if present is not None and per_prototype:
            domains = -1 - torch.nonzero(present[:, c]).flatten().repeat_interleave(per_prototype)
        rows = torch.cat((step1, domains))
        if fill != "paper":
            own, rows = _from_pool(own, rows, total, rng)
        kept.append(own)
        label.append(torch.full((len(rows),), c, dtype=torch.int64))
        source.append(rows)
    empty = torch.empty(0, dtype=torch.int64)
    number = [torch.arange(len(rows)) for rows in source]
    order = torch.arange(len(y)) if fill == "paper" else torch.cat([empty, *kept]).sort().values
    return RowPlan(order, *(torch.cat([empty, *part]) for part in (label, source, number)))


def make_rows(
    plan: RowPlan, rows: Tensor, x: Tensor, geometry: Geometry, prototypes: Tensor | None, noise: Noise
) -> Tensor:
    """Rows ``rows`` (k,) of the plan, (k, d): their points plus noise in the shape of their class.

    ``x`` (n, d) are the client's own rows, ``prototypes`` (Q, C, d).
    """
    label, source = plan.label[rows], plan.source[rows]
    out = x.new_empty(len(rows), x.shape[1])
    own = source >= 0
    out[own] = x[source[own]]
    if prototypes is not None and not bool(own.all()):
        out[~own] = prototypes[-1 - source[~own], label[~own]].to(x)
    for c in torch.unique(label).tolist():
        here = torch.nonzero(label == c).flatten()
        a = geometry[c]
        p, wide = len(a), len(a) + (x.shape[1] if geometry.jitter else 0)
        if wide:
            z = noise(c, plan.number[rows[here]], wide).to(x)
            step = z[:, :p] @ a.to(x)
            if geometry.jitter:
                step += z[:, p:] * geometry.jitter**0.5
            out[here] += step
    return out


def augment(
    x: Tensor,
    y: Tensor,
    geometry: Geometry,
    *,
    target: int,
    prototypes: Any = None,
    per_prototype: int = 0,
    noise: Any,
) -> tuple[Tensor, Tensor]:
    """A client's rows, all kept and first, followed by the generated ones: ``(x, y)`` with N >= n rows.

    Generated rows come class by class, within a class step 1 (around own rows, up to ``target`` rows) before step 2
    (``per_prototype`` rows around each prototype).

    Args:
        x: own embeddings (n, d).
        y: their classes (n,).
        geometry: of all classes, from ``class_geometry``.
        target: rows per class that step 1 fills up to; classes without own rows are left out.
        prototypes: means of the classes in the other domains: (Q, C, d), rows of NaN where a domain lacks a class; or
            a sequence of Q ``ClassStatistics``.
        per_prototype: rows M around each of them.
        noise: a ``torch.Generator`` or NumPy's, an integer key of a counter-based source, a function (rows, width) ->
            normal numbers (rows, width), or an array of such numbers with a row for every generated row.
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    means, present = _prototypes(prototypes)
    plan = plan_rows(y, geometry.n, target=target, present=present, per_prototype=per_prototype)
    new = make_rows(plan, torch.arange(len(plan)), x, geometry, means, as_noise(noise))
    return torch.cat((x, new)), torch.cat((y, plan.label.to(y.dtype)))


def as_noise(noise: Any) -> Noise:
    """Any source of normal numbers as a function (class, row numbers, width)."""
    if isinstance(noise, KeyedNoise):
        return noise
    if isinstance(noise, torch.Generator):
        return lambda _, rows, width: torch.randn(len(rows), width, generator=noise, dtype=torch.float64)
    if isinstance(noise, np.random.Generator):
        return lambda _, rows, width: torch.from_numpy(noise.standard_normal((len(rows), width)))
    if isinstance(noise, int):
        return KeyedNoise(noise)
    if isinstance(noise, Tensor | np.ndarray):
        return _Rows(torch.as_tensor(noise))
    if callable(noise):
        return lambda _, rows, width: torch.as_tensor(noise(len(rows), width))
    raise ValueError(
        f"noise is {type(noise).__name__}; expected a torch.Generator, an integer key or a function (rows, width)"
    )


class _Rows:
    """Hands out the rows of a given tensor in order."""

    def __init__(self, numbers: Tensor):
        self.numbers, self.used = numbers, 0

    def __call__(self, label: int, rows: Tensor, width: int) -> Tensor:
        part = self.numbers[self.used : self.used + len(rows), :width]
        if part.shape != (len(rows), width):
            raise ValueError(
                f"noise has shape {tuple(self.numbers.shape)}; class {label} needs {width} columns"
            )
        self.used += len(rows)
        return part


@dataclass(frozen=True, kw_only=True)
class GeneratedData(LocalData):
    """A client's samples followed by its generated rows, which are made whenever they are read."""

    own: LocalData
    plan: RowPlan
    geometry: Geometry
    prototypes: Tensor | None
    noise: Noise
    normalize_rows: bool = False
    held: Tensor | None = None  # all generated rows (M, d), where memory allows

    def __len__(self) -> int:
        return len(self.plan.kept) + len(self.plan)

    def read(self, rows: Tensor, rng: torch.Generator | None = None) -> Batch:
        """Positions ``rows``: own samples first, generated ones from ``len(plan.kept)`` on."""
        n = len(self.plan.kept)
        made = torch.nonzero(rows >= n).flatten()
        real = torch.nonzero(rows < n).flatten()
        first = self.own.read(self.plan.kept[rows[real]], rng)
        if not len(made):
            return first
        which = rows[made] - n
        new = self.generate(which) if self.held is None else self.held[which]
        x = first.x.new_empty(len(rows), *first.x.shape[1:])
        y = first.y.new_empty(len(rows))
        x[real], y[real] = first.x, first.y
        x[made], y[made] = new.view(len(made), *first.x.shape[1:]), self.plan.label[which]
        return Batch(x, y)

    def hold(self, budget: int) -> GeneratedData:
        """The same with all generated rows made at once, if they take at most ``budget`` bytes.

        That depends on sizes alone, so it is the same on every worker: rows made together may differ in their last
        bit from rows made apart.
        """
        width = getattr(self.samples, "width", 0)
        if len(self.plan) * width * self.dtype.itemsize > budget:
            return self
        return replace(self, held=self.generate(torch.arange(len(self.plan))))

    def generate(self, which: Tensor) -> Tensor:
        """Generated rows ``which`` (k,) as they enter training, (k, d)."""
        sources = self.plan.source[which]
        needed = torch.unique(sources[sources >= 0])
        x = self.own.read(needed).x.flatten(1)
        place = torch.zeros(len(self.own), dtype=torch.int64)
        place[needed] = torch.arange(len(needed))
        source = torch.where(sources >= 0, place[sources.clamp(min=0)], sources)
        part = RowPlan(self.plan.kept, self.plan.label[which], source, self.plan.number[which])
        new = make_rows(part, torch.arange(len(which)), x, self.geometry, self.prototypes, self.noise)
        return torch.nn.functional.normalize(new, dim=1) if self.normalize_rows else new


def _from_pool(own: Tensor, rows: Tensor, total: int, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The authors' filling of one class: own rows in use, and the rows taken from the pool."""
    if len(own) >= total:
        return own[torch.randperm(len(own), generator=rng)[:total]], rows[:0]
    if not len(own):
        return own, rows[:total]
    return own, rows[torch.randperm(len(rows), generator=rng)[: total - len(own)]]


def _prototypes(given: Any) -> tuple[Tensor | None, Tensor | None]:
    """Prototypes as means (Q, C, d) and which of them exist (Q, C)."""
    if given is None:
        return None, None
    if isinstance(given, Sequence) and len(given) and isinstance(given[0], ClassStatistics):
        return torch.stack([s.mean for s in given]), torch.stack([s.n > 0 for s in given])
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, Sequence):
        given = torch.stack([torch.as_tensor(part) for part in given]) if len(given) else torch.empty(0, 0, 0)
    means = torch.as_tensor(given)
    if means.numel() == 0:
        return None, None
    means = means[None] if means.dim() == 2 else means
    if means.dim() != 3:
        raise ValueError(f"prototypes have shape {tuple(means.shape)}; expected (domains, classes, d)")
    return means, ~torch.isnan(means).any(2)
