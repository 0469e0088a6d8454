"""FedProto's local rule: features are pulled to the global means of their classes (Tan et al. 2022, eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.sgd import SGDClient
from fedsim.data.local import Batch, LocalData
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.models.split import features_and_output, features_of
from fedsim.task.evaluation import features
from fedsim.task.heads import check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class FedProtoClient(SGDClient):
    """Adds ``lamb`` times a distance of features to their class's global prototype to the loss.

    ``pull=samples``: the squared distance of every sample, mean over samples and coordinates (the authors' code);
    ``means``: that of the batch's class means, mean over coordinates and sum over classes (eq. 7).

    Sends the sums ``features`` (C, f) and counts ``n`` (C,) of its classes' features after training. ``personal``: the
    model, client state ``w`` (d,), stays with the client and is never averaged, as published.
    """

    grad_only = False

    lamb: float
    personal: bool
    pull: str = "samples"

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without a representation."""
        check_features(task, "FedProto")

    def fit(self, job: Job) -> Update:
        """SGD on the joint loss, then the classes' features."""
        if job.num_steps == 0:
            raise Refusal("no samples" if len(job.data) == 0 else "no local steps")
        w = self.begin(job, self._start(job))
        for batch in job.batches():
            w = self.step(job, w, batch)
        sums, counts = self._features(job, w)
        arrays = {"features": sums, "n": counts}
        if self.personal:
            kept = job.local_part.keep(job.model, w)
            return Update(
                arrays, job.weight(self.weighting), state={"w": w.clone(), **kept}, metrics=job.report()
            )
        return Update(arrays | {"delta": job.delta(w)}, job.weight(self.weighting), metrics=job.report())

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step on cross entropy plus the pull; classes without a prototype are not pulled."""
        means, known = job.message.arrays.get("prototypes"), job.message.arrays.get("known")
        if means is None or known is None:
            return job.sgd(w, job.grad(w, batch))
        here = known[batch.y] > 0

        def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            z, logits = output
            if self.pull == "means":
                near = class_mean_distance(z, y, means, known)
            else:
                near = F.mse_loss(torch.where(here[:, None], z, means[y]), means[y])
            return job.task.loss(logits, y) + self.lamb * near

        return job.sgd(w, job.grad(w, batch, loss=loss, forward=_both))

    def evaluate(self, job: Job) -> Update:
        """Measure on what this client is measured on."""
        return self._measure(job, job.holdout)

    def test(self, job: Job) -> Update:
        """Measure on the common test set."""
        return self._measure(job, job.test)

    @property
    def personalises(self) -> bool:
        """Unless the models are averaged."""
        return self.personal

    def own_weights(self, job: Job) -> Tensor:
        """The own model; of a client that never trained, and where models are averaged, the received one."""
        received = job.start()
        return job.state.get("w", received)

    def own_model(self, job: Job) -> nn.Module:
        """Once there are prototypes, the own model with the nearest one as its prediction."""
        model, arrays = super().own_model(job), job.message.arrays
        if not self.personal or "prototypes" not in arrays:
            return model
        return NearestPrototype(model, arrays["prototypes"], arrays["known"]).eval()

    def _measure(self, job: Job, data: LocalData | None) -> Update:
        if data is None or not len(data):
            raise Refusal("nothing to be measured on")
        w = self.own_weights(job)
        found = job.measure(data, w)
        means, known = job.message.arrays.get("prototypes"), job.message.arrays.get("known")
        if self.personal and means is not None and known is not None:
            found = self._nearest(job, data, w, (means, known), found)
        return Update(metrics=found, weight=len(data))

    def _nearest(
        self,
        job: Job,
        data: LocalData,
        w: Tensor,
        prototypes: tuple[Tensor, Tensor],
        head: Mapping[str, float],
    ) -> dict[str, float]:
        """Metrics of the nearest global prototype, those of the model's own ``head`` beside; its loss stays the loss.

        ``argmin_j |f(x) - C_j|`` over the classes that have a prototype (section 3.4 of the paper).
        """
        (means, known), logits, labels = prototypes, list[Tensor](), list[Tensor]()
        for rows in torch.split(torch.arange(len(data)), 512):
            batch = data.read(rows)
            z = features(job.model, w, [batch])[0].flatten(1)
            logits.append(nearness(z, means, known))
            labels.append(batch.y)
        job.meter.forward(len(data))
        near = job.score(torch.cat(logits), torch.cat(labels))
        by_head = {f"head/{k}": v for k, v in head.items() if k != "loss"}
        return {**near, "loss": head["loss"], **by_head}

    def _start(self, job: Job) -> Tensor:
        w = job.start()
        return w.copy_(job.state["w"]) if "w" in job.state else w

    def _features(self, job: Job, w: Tensor) -> tuple[Tensor, Tensor]:
        classes, sums, counts = job.source.dataset.num_classes, None, None
        for rows in torch.split(torch.arange(len(job.data)), 512):
            x, y = job.data.read(rows)
            z = job.forward(w, x, _features)
            one_hot = F.one_hot(y, classes).to(z)
            sums = one_hot.T @ z if sums is None else sums + one_hot.T @ z
            counts = one_hot.sum(0) if counts is None else counts + one_hot.sum(0)
        assert sums is not None and counts is not None
        return sums, counts


class NearestPrototype(nn.Module):
    """``model.features``, classified by the nearest of ``prototypes`` (C, f) of the classes that are ``known`` (C,)."""

    prototypes: Tensor
    known: Tensor

    def __init__(self, model: nn.Module, prototypes: Tensor, known: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("prototypes", prototypes.detach().cpu().clone())
        self.register_buffer("known", known.detach().cpu().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Minus the distances (B, C)."""
        return nearness(_features(self.model, x), self.prototypes, self.known)


def nearness(z: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """Minus the distance (n, C) of features ``z`` (n, f) from ``means`` (C, f); minus infinity where none is known."""
    return (-torch.cdist(z, means)).masked_fill(known == 0, -torch.inf)


def class_mean_distance(z: Tensor, y: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """Eq. 7 on a batch: ``sum_c mean((mean of z of class c - means_c)^2)`` over its classes with a prototype.

    ``z`` (B, f), ``y`` (B,), ``means`` (C, f), ``known`` (C,), 0 where there is no prototype.
    """
    one_hot = F.one_hot(y, len(means)).to(z)
    counts = one_hot.sum(0)
    own = one_hot.T @ z / counts.clamp(min=1)[:, None]
    return (own - means).square().mean(1)[(counts > 0) & (known > 0)].sum()


def _features(model: nn.Module, x: Tensor) -> Tensor:
    return features_of(model, x).flatten(1)


def _both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    z, logits = features_and_output(model, x)
    return z.flatten(1), logits
