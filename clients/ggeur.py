"""GGEUR's local half around any local rule: class statistics go up once, generated rows join the client's own.

Dai et al., CVPR 2025 (algorithms 1 and 2). What leaves a client are counts, means and covariance factors of its
classes. That is not nothing: a class with one row sends the row itself as its mean, with n <= d rows the span of the
rows, counts are the label mix. ``min_count`` keeps small classes back; ``clip`` and ``noise`` perturb what is sent.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.generated import GeneratedData, plan_rows
from clients.geometry import ClassStatistics, Geometry, class_geometry, class_statistics
from clients.noise import KeyedNoise
from fedsim import rng
from fedsim.data.local import LocalData
from fedsim.errors import ClientError
from fedsim.exchange.payload import NonFinite, Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How a client fills up its classes; see ``strategies.ggeur.GGEUR`` for each option."""

    target: int | None
    per_prototype: int
    fill: str
    total: int
    shape: str
    redraw: bool
    renormalize: bool
    memory_mb: int


@dataclass(frozen=True, kw_only=True)
class GgeurPrivacy:
    """What is kept back or perturbed before statistics are sent."""

    min_count: int
    clip: float | None
    noise: float

    @property
    def traits(self) -> dict[str, Any]:
        """What a method must say of itself that sends statistics so."""
        alone = "the mean of a class with one row is that row; type strategy.min_count=2, or more"
        return {} if self.min_count > 1 else {"exposes": alone}


class GgeurClient:
    """``inner`` trains on the client's rows and those generated for it; everything else is inner's own business."""

    grad_only = False

    caches: ClassVar[frozenset[str]] = frozenset({"_made"})

    def __init__(self, inner: Any, filling: Filling, privacy: GgeurPrivacy):
        self.inner, self.filling, self.privacy = inner, filling, privacy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def vectorisable(self) -> bool:
        """Whether the inner rule is: rows are added before it starts."""
        return bool(self.inner.vectorisable)

    def setup(self, task: Task, layout: Layout) -> None:
        """Forget what was made for another run."""
        self._made: OrderedDict[Any, GeneratedData] = OrderedDict()
        self.inner.setup(task, layout)

    def statistics(self, job: Job) -> Update:
        """Counts, means and triangular covariance factors of the client's classes, and its domain."""
        x, y = _embeddings(job.data)
        bad = torch.nonzero(~torch.isfinite(x).all(1)).flatten()
        if len(bad):
            raise NonFinite(f"row {int(bad[0])} of its embeddings is not finite ({len(bad)} rows)")
        if self.privacy.clip is not None:
            x = x * (self.privacy.clip / x.norm(dim=1, keepdim=True)).clamp(max=1)
        found = class_statistics(x, y, _num_classes(job))
        count = torch.where(found.n >= self.privacy.min_count, found.n, 0)
        if self.privacy.noise:
            found = _perturbed(found, count, self.privacy, job.rng("privacy"))
        arrays = pack(ClassStatistics(count, found.mean, found.factors), job.model.w.dtype)
        return Update(arrays, weight=len(y), values={"domain": job.domain})

    def receive(self, job: Job) -> Update:
        """Take the geometry that this exchange brings; later ones rely on it."""
        return Update()

    def prepare(self, job: Job) -> None:
        """Before local training: put the generated rows behind the client's own."""
        self.inner.prepare(job)
        if "ggeur/A" not in job.message.arrays:
            return
        key = (job.client, job.values["ggeur/version"], job.round if self.filling.redraw else 0)
        data = self._made.get(key)
        if data is None:
            data = self._made[key] = self._augmented(job)
            while len(self._made) > 1 and sum(map(_held_bytes, self._made.values())) > self._budget:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        job.data = data
        job.metrics["generated_rows"] = float(len(data.plan))

    @property
    def _budget(self) -> int:
        return self.filling.memory_mb << 20

    def _augmented(self, job: Job) -> GeneratedData:
        own, fill, arrays = job.data, self.filling, job.message.arrays
        y = _labels(own)
        geometry = unpack_geometry(arrays, float(job.values["ggeur/jitter"]))  # type: ignore[arg-type]
        if fill.shape == "own":
            x, _ = _embeddings(own)
            local = class_geometry(class_statistics(x, y, len(geometry)))
            geometry = Geometry(geometry.n, tuple(a.to(x) for a in local.factors), geometry.jitter)
        elif fill.shape == "none":
            geometry = Geometry(geometry.n, tuple(a[:0] for a in geometry.factors))
        present, means = arrays.get("ggeur/present"), arrays.get("ggeur/prototypes")
        if present is not None:
            present = present.cpu() > 0
            present[[q for q in range(len(present)) if q == job.domain]] = False
        target = (2000 if present is None else 500) if fill.target is None else fill.target
        part = job.round if fill.redraw else 0
        plan = plan_rows(
            y.cpu(),
            geometry.n.cpu(),
            target=target,
            present=present,
            per_prototype=fill.per_prototype,
            fill=fill.fill,
            total=fill.total,
            rng=rng.torch_rng(job.seed, "ggeur/pool", part, job.client),
        )
        data = GeneratedData(
            samples=own.samples,
            index=own.index,
            dtype=own.dtype,
            normalize=own.normalize,
            augment=own.augment,
            own=own,
            plan=plan,
            geometry=geometry,
            prototypes=means,
            noise=KeyedNoise(rng.key(job.seed, "ggeur/rows", part, job.client)),
            normalize_rows=fill.renormalize,
        )
        return data.hold(self._budget // 8)


def pack(statistics: ClassStatistics, dtype: torch.dtype) -> dict[str, Tensor]:
    """For travelling: ``n`` (C,), ``mean`` (k, d) of the k classes with rows, ``factor``: their triangles in a row."""
    kept = torch.nonzero(statistics.n > 0).flatten().tolist()
    d = statistics.mean.shape[1]
    flat = [statistics.factors[c][tuple(torch.triu_indices(len(statistics.factors[c]), d))] for c in kept]
    return {
        "n": statistics.n,
        "mean": statistics.mean[kept].to(dtype),
        "factor": torch.cat([statistics.mean.new_zeros(0), *flat]).to(dtype),
    }


def unpack(n: Tensor, mean: Tensor, factor: Tensor, full: bool) -> list[ClassStatistics]:
    """From counts (K, C), means (sum k, d) and triangles of K clients; ``full`` ones have d rows whatever n is."""
    out, row, place, d = [], 0, 0, mean.shape[1]
    mean, factor = mean.double(), factor.double()
    for counts in n:
        means, factors = mean.new_zeros(len(counts), d), []
        for c, count in enumerate(counts.tolist()):
            r = 0 if not count else d if full else min(count - 1, d)
            triangle = mean.new_zeros(r, d)
            size = r * d - r * (r - 1) // 2
            triangle[tuple(torch.triu_indices(r, d))] = factor[place : place + size]
            place += size
            factors.append(triangle)
            if count:
                means[c] = mean[row]
                row += 1
        out.append(ClassStatistics(counts, means, tuple(factors)))
    return out


def unpack_geometry(arrays: Any, jitter: float) -> Geometry:
    """The broadcast geometry: ``ggeur/A`` (sum p, d) cut by ``ggeur/p`` (C,), made of ``ggeur/of`` (C,) rows."""
    parts = torch.split(arrays["ggeur/A"], [int(p) for p in arrays["ggeur/p"].tolist()])
    return Geometry(arrays["ggeur/of"], parts, jitter)


def _perturbed(
    found: ClassStatistics, count: Tensor, privacy: GgeurPrivacy, generator: torch.Generator
) -> ClassStatistics:
    """Gaussian noise on the sums of x and xx' (sensitivities ``clip`` and ``clip``^2), then the nearest covariance.

    ``noise`` is the multiplier of each sensitivity; counts are not perturbed. What a run spends in (epsilon, delta)
    is left to an accountant: two Gaussian mechanisms per class.
    """
    assert privacy.clip is not None
    d, mean, factors = found.mean.shape[1], found.mean.clone(), list(found.factors)
    for c in torch.nonzero(count > 0).flatten().tolist():
        n = int(count[c])
        first = torch.randn(d, generator=generator, dtype=torch.float64)
        second = torch.randn(d, d, generator=generator, dtype=torch.float64).triu()
        second = second + second.triu(1).T
        moment = found.covariance(c) + torch.outer(mean[c], mean[c])
        moment = moment + privacy.noise * privacy.clip**2 / n * second
        mean[c] += privacy.noise * privacy.clip / n * first
        lam, v = torch.linalg.eigh(moment - torch.outer(mean[c], mean[c]))
        r = torch.linalg.qr(lam.clamp(min=0).sqrt()[:, None] * v.T, mode="r").R
        factors[c] = r * torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None]
    return ClassStatistics(found.n, mean, tuple(factors))


def _embeddings(data: LocalData) -> tuple[Tensor, Tensor]:
    """All rows of a client as vectors (n, d), and their classes."""
    batch = data.everything()
    return batch.x.flatten(1), batch.y


def _labels(data: LocalData) -> Tensor:
    labels = data.samples.labels
    assert labels is not None, "GGEUR is refused without class labels"
    return labels.index_select(0, data.index.to(labels.device)).cpu()


def _num_classes(job: Job) -> int:
    classes = job.source.dataset.num_classes
    if not classes:
        raise ClientError("GGEUR needs class labels: this data set has none")
    return classes


def _held_bytes(data: GeneratedData) -> float:
    return 0 if data.held is None else data.held.numel() * data.held.element_size()
