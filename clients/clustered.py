"""The local half of clustered methods: a client that receives all centres chooses one, and goes on from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clients.around import Around, mean_loss
from fedsim.exchange.payload import Payload, Refusal, Update
from fedsim.local.job import Job

CHOICES = ("loss", "distance", "cosine")
OFFERED = ("centres", "centre_buffers", "directions")


class ClusterClient(Around):
    """``inner`` from the model of the client's own cluster.

    The server sends that model (``w``), or all ``centres`` (k, d) with ``centre_buffers`` (k, b). Among those a client
    chooses by its training samples alone, the first if several are alike. ``choice``:
    ``loss``, the least mean loss (IFCA); or after training once from each, ``distance``, where its model stays nearest
    (FeSEM), ``cosine``, where its update points most along the cluster's last mean update, ``directions`` (k, d) (CFL).
    ``gradient``: it sends one step along the gradient over all its samples instead of training, weighed so.
    """

    personalises = True

    def __init__(self, inner: Any, choice: str, gradient: str = ""):
        super().__init__(inner)
        self.choice, self.gradient = choice, gradient

    @property
    def vectorisable(self) -> bool:
        """Whether the inner rule is, where nobody has to choose."""
        return bool(self.inner.vectorisable) and self.choice != "loss"

    def fit(self, job: Job) -> Update:
        """Train from the own centre; what was chosen goes up as ``cluster``, by loss with its ``loss``."""
        values = self.choose(job)
        return replace(update := self._trained(job), values={**update.values, **values})

    def join(self, job: Job) -> Update:
        """The same for a client that the server knows no cluster of."""
        return self.fit(job)

    def spread(self, job: Job) -> Update:
        """Long training from the common start, to find starts for the centres; nothing of it is kept."""
        epochs = int(job.values["epochs"])  # type: ignore[arg-type]
        job.local = replace(job.local, epochs=epochs, steps=None, min_epochs=None)
        update: Update = self.inner.fit(job)
        job.kept = {}
        return replace(update, state=None)

    def evaluate(self, job: Job) -> Update:
        """Measure the own centre's model, and what the inner rule makes of it."""
        self.choose(job)
        return self.inner.evaluate(job)  # type: ignore[no-any-return]

    def own_model(self, job: Job) -> nn.Module:
        """The same as a module."""
        self.choose(job)
        return self.inner.own_model(job)  # type: ignore[no-any-return]

    def newcomer(self, job: Job) -> Tensor:
        """The centre's model that a client which never takes part is measured with."""
        self.choose(job)
        return job.start()

    def choose(self, job: Job) -> dict[str, float | int]:
        """Where the message offers centres, put the chosen one into it as ``w``; values for the update."""
        offered = job.message
        if "centres" not in offered.arrays:
            return {}
        k = len(offered.arrays["centres"])
        if not len(job.data):
            raise Refusal("no samples to choose a cluster by")
        costs = (
            [0.0] * k if k == 1 and self.choice != "loss" else [self._cost(job, offered, j) for j in range(k)]
        )
        cluster = min(range(k), key=costs.__getitem__)
        job.message = _at(offered, cluster)
        return {"cluster": cluster} | ({"loss": costs[cluster]} if self.choice == "loss" else {})

    def _cost(self, job: Job, offered: Payload, j: int) -> float:
        job.message = _at(offered, j)
        if self.choice == "loss":
            return mean_loss(job)
        delta = self._trained(job).arrays["delta"].double()
        if self.choice == "distance":
            cost = delta.square().sum()
        else:
            direction = offered.arrays["directions"][j].double()
            cost = -(delta @ direction) / (delta.norm() * direction.norm() + 1e-12)
        job.restart()
        job.keep, job.kept = {}, None
        return float(cost)

    def _trained(self, job: Job) -> Update:
        if not self.gradient:
            return self.inner.fit(job)  # type: ignore[no-any-return]
        if not len(job.data):
            raise Refusal("no samples")
        w = job.start()
        step = job.full_gradient(w).mul_(-job.lr)
        delta = job.delta(w.add_(step))
        return Update({"delta": delta}, weight=job.weight(self.gradient))


def _at(offered: Payload, j: int) -> Payload:
    """The message of centre ``j`` alone."""
    arrays = {k: v for k, v in offered.arrays.items() if k not in OFFERED}
    for name, own in (("w", "centres"), ("buffers", "centre_buffers")):
        if own in offered.arrays:
            arrays[name] = offered.arrays[own][j]
    return Payload(arrays, offered.values)
