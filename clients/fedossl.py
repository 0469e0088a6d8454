"""FedoSSL's local rule (Zhang, Guo, Xu, Guo, Luo, Guo 2023, Algorithm 1, client)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from clients.openworld import Constants, OpenObjective, TwoViews, class_weights
from clients.sgd import SGDClient
from clients.sinkhorn import local_centroids
from fedsim.data.local import Batch, LocalData
from fedsim.data.mixed import mixed
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.models.split import features_and_output, logits_of
from fedsim.task.heads import check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task

CHUNK = 512  # samples that are looked at together


@dataclass(frozen=True, kw_only=True)
class FedoSSLClient(SGDClient):
    """SGD on ``objective`` over batches of all samples, labelled and not, each shown twice by ``view``.

    Client state: ``memory`` (R, D), unit features of the last ``memory`` samples trained on, and ``fill`` (1,), how
    many of its rows are in use, R plus the next row's number once it is full; ``counts`` (C,) and ``uncertainty`` (1,)
    of the received model on the client's own samples.

    Sends, where the objective calibrates, ``centroids`` (L, D) of the memory and how many of them there are,
    ``rows`` (1,), and of classes with at least ``min_count`` labelled samples ``present`` (C,) the mean unit feature
    ``means`` (C, D). Global centroids ``m`` (C, D) count from round ``cal_start`` on (from 1), against predictions from
    ``ce_start``.
    """

    grad_only = False

    vectorisable = False
    objective: OpenObjective
    centroids: int
    memory: int
    min_count: int
    view: str
    cal_start: int
    ce_start: int

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a representation."""
        check_features(task, "FedoSSL")

    def fit(self, job: Job) -> Update:
        """Local training on both kinds of samples."""
        data = mixed(job.data, job.unlabelled)
        if not len(data):
            raise Refusal("no samples")
        w, memory, outputs = job.start(), FeatureMemory.of(self.memory, job.state), 0
        known = self._constants(job, w)
        for batch in job.batches(data=data):
            z, outputs = self._descend(job, w, batch, known)
            if self.objective.calibrates:
                memory.push(z)
        if not job.steps:
            raise Refusal("one sample, too few for BatchNorm")
        arrays = self._shared(job, w, memory, outputs) if self.objective.calibrates else {}
        weight = float(len(data)) if self.weighting == "samples" else 1.0
        state = {"counts": job.keep["counts"], "uncertainty": job.keep["uncertainty"], **memory.state}
        return Update({**arrays, "delta": job.delta(w)}, weight, state=state, metrics=job.report())

    def guess(self, job: Job) -> Update:
        """The received model's guesses (n,) of the unlabelled samples' classes, for the evaluator alone."""
        if job.unlabelled is None or not len(job.unlabelled):
            raise Refusal("no unlabelled samples")
        w = job.start()
        found = [logits.argmax(1) for _, logits, _ in looked(job, w, job.unlabelled)]
        return Update({"guesses": torch.cat(found)}, weight=len(job.unlabelled))

    def _constants(self, job: Job, w: Tensor) -> Constants:
        """Counts of predicted classes and mean uncertainty at the received model, and which losses count."""
        counts, doubts = job.class_counts, list[Tensor]()
        for _, logits, _ in looked(job, w, job.unlabelled):
            most, c = F.softmax(logits, dim=1).max(1)
            found = torch.bincount(c, minlength=logits.shape[1])
            counts = found + F.pad(counts, (0, len(found) - len(counts)))
            doubts.append(1 - most)
        uncertainty = torch.cat(doubts).mean() if doubts else w.new_zeros(())
        job.keep |= {"counts": counts.to(w), "uncertainty": uncertainty[None]}
        job.metrics["uncertainty"] = float(uncertainty)
        rho = class_weights(job.keep["counts"], self.objective.tau, self.objective.form)
        number = job.round + 1
        m = job.message.arrays.get("m") if number >= self.cal_start else None
        return Constants(rho, float(uncertainty), m, number >= self.ce_start)

    def _descend(self, job: Job, w: Tensor, batch: Batch, known: Constants) -> tuple[Tensor, int]:
        """One step in place; features (B, D) of the first view, and how many classes the model tells apart."""
        first, second = (job.view(self.view, batch).x for _ in range(2))
        n, seen = batch.size, list[TwoViews]()

        def draw() -> torch.Generator:
            return job.rng("partners", len(job.meter.losses))

        def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            z, logits = output[0].flatten(1), logits_of(output[1])
            views = TwoViews(z[:n], logits[:n], z[n:], logits[n:])
            seen.append(views)
            partner = self.objective.partners(views.z, y, draw)
            return self.objective.value(views, y, partner, known)

        plain = isinstance(first, Tensor)
        both = torch.cat((first, second)) if plain else tree_map(lambda *t: torch.cat(t), first, second)
        job.descend(w, Batch(both, batch.y), loss=loss, forward=features_and_output)
        return seen[0].z.detach(), seen[0].logits.shape[1]

    def _shared(self, job: Job, w: Tensor, memory: FeatureMemory, classes: int) -> dict[str, Tensor]:
        """Centroids of the memory, and means of those of ``classes`` that this client has labels for."""
        rows = memory.rows
        start = torch.randperm(len(rows), generator=job.rng("centroids"))[: self.centroids]
        found = local_centroids(rows, rows[start.to(rows.device)])
        centroids = rows.new_zeros((self.centroids, rows.shape[1]))
        centroids[: len(found)] = found
        counts = job.class_counts
        counts = F.pad(counts, (0, classes - len(counts)))
        sums = rows.new_zeros((classes, rows.shape[1]))
        for z, _, y in looked(job, w, job.data):
            sums += F.one_hot(y, classes).to(z).T @ F.normalize(z, dim=1)
        present = counts >= max(1, self.min_count)
        means = (sums / counts.clamp(min=1)[:, None]).where(present[:, None], 0)
        return {
            "centroids": centroids,
            "rows": rows.new_tensor([len(found)]),
            "means": means,
            "present": present.to(rows),
        }


class FeatureMemory:
    """A ring of ``size`` rows; see ``FedoSSLClient``."""

    def __init__(self, size: int, rows: Tensor | None, fill: int):
        self.size, self._ring, self.fill = size, rows, fill

    @staticmethod
    def of(size: int, state: Mapping[str, Tensor]) -> FeatureMemory:
        """What a client kept, as a copy."""
        if "memory" not in state:
            return FeatureMemory(size, None, 0)
        return FeatureMemory(size, state["memory"].clone(), int(state["fill"]))

    def push(self, z: Tensor) -> None:
        """Features (B, D), to unit length, in the places of the oldest."""
        unit = F.normalize(z, dim=1)
        if self._ring is None:
            self._ring = unit.new_zeros((self.size, unit.shape[1]))
        places = (self.fill + torch.arange(len(unit), device=unit.device)) % self.size
        self._ring[places[-self.size :]] = unit[-self.size :]
        self.fill += len(unit)
        if self.fill >= 2 * self.size:
            self.fill = self.size + self.fill % self.size

    @property
    def rows(self) -> Tensor:
        """Those in use (n, D)."""
        assert self._ring is not None
        return self._ring[: self.fill]

    @property
    def state(self) -> dict[str, Tensor]:
        """What the client keeps; nothing before the first batch."""
        if self._ring is None:
            return {}
        return {"memory": self._ring, "fill": self._ring.new_tensor([self.fill])}


def looked(job: Job, w: Tensor, data: LocalData | None) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Features (n, D), logits (n, C) and labels of ``data`` at ``w`` (d,), part by part, in evaluation mode."""
    if data is None or not len(data):
        return
    for rows in torch.split(torch.arange(len(data)), CHUNK):
        x, y = data.read(rows)
        with job.model.measuring(w) as again:
            again()
            z, output = features_and_output(job.model.module, x)
        job.meter.forward(len(rows))
        yield z.flatten(1).clone(), logits_of(output).clone(), y
