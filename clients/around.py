"""A local rule around another: everything that it does not say itself is the inner rule's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.payload import NonFinite, Refusal, Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.task import Task


class Around:
    """``inner`` with something before or after its training."""

    grad_only = False

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def setup(self, task: Task, layout: Layout) -> None:
        """The inner rule's."""
        self.inner.setup(task, layout)


def mean_loss(job: Job) -> float:
    """Mean loss of the received model over all of the client's training samples, in evaluation mode.

    Raises:
        Refusal: without samples.
        NonFinite: if it is NaN or infinite, so that nothing can be chosen or weighed by it.
    """
    if len(job.data) == 0:
        raise Refusal("no samples")
    found = job.evaluate(job.data)
    if "loss" not in found:
        raise ClientError("the task measures no loss, by which this method weighs or chooses")
    loss = float(found["loss"])
    if not abs(loss) < float("inf"):
        raise NonFinite("the received model's loss on its training samples; a smaller client.lr may help")
    return loss


class WeighedClient(Around):
    """``inner`` whose update weighs what the server says (``weight`` in the message), else ``weighting``.

    The server asks for the loss first (``training_loss``), which goes up in the clear: a client that reports a large
    one weighs more.
    """

    def __init__(self, inner: Any, weighting: str):
        super().__init__(inner)
        self.weighting = weighting

    @property
    def vectorisable(self) -> bool:
        """Whether the inner rule is."""
        return bool(self.inner.vectorisable)

    def training_loss(self, job: Job) -> Update:
        """``loss`` of the received model over all training samples, and ``size``, what the client weighs by itself."""
        loss = mean_loss(job)
        return Update(values={"loss": loss, "size": job.weight(self.weighting)}, metrics={"loss": loss})

    def fit(self, job: Job) -> Update:
        """The inner rule's training."""
        return self._weighed(job, self.inner.fit(job))

    def finish(self, job: Job, w: Tensor) -> Update:
        """The same where many clients are trained at once."""
        return self._weighed(job, self.inner.finish(job, w))

    def _weighed(self, job: Job, update: Update) -> Update:
        given = job.message.arrays.get("weight")
        weight = job.weight(self.weighting) if given is None else float(given)
        values = dict(update.values)
        if job.values.get("norms"):
            values["norm2"] = float(update.arrays["delta"].double().square().sum())
        return replace(update, weight=weight, values=values)
