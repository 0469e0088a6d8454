"""The local half of a method, as workers see it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout
from fedsim.task.task import Task


class ClientLike(Protocol):
    """What any client has; ``clients.base.Client`` gives defaults for all of it.

    Further exchanges call the method that they are named after, ``(job) -> Update``.
    """

    @property
    def vectorisable(self) -> bool:
        """Whether ``begin``, ``step`` and ``finish`` are all of ``fit``, with vectors (..., d) in the first two."""

    def setup(self, task: Task, layout: Layout) -> None:
        """Once per worker, before the first job."""

    def keeps(self, layout: Layout) -> frozenset[str]:
        """Names of the parameters that never leave their client."""

    def init_state(self, layout: Layout) -> dict[str, Tensor]:
        """State of a client that never took part."""

    def prepare(self, job: Job) -> None:
        """Before each job, whatever the exchange: may replace ``job.data``."""

    def newcomer(self, job: Job) -> Tensor:
        """The model (d,) that a client which never takes part starts from, in the resident vector."""

    def fit(self, job: Job) -> Update:
        """Local training."""

    def evaluate(self, job: Job) -> Update:
        """Measure the received model on what this client is measured on."""


@runtime_checkable
class SaysHowItLooks(Protocol):
    """A client that says whether it looks at samples by gradients alone, as ``clients.base.Client`` does."""

    grad_only: bool


class Stepwise(ClientLike, Protocol):
    """A client that declares itself vectorisable."""

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Once, before the first step: where training starts (..., d)."""

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One mini-batch step on ``w`` (..., d)."""

    def finish(self, job: Job, w: Tensor) -> Update:
        """What one client sends, from its final weights (d,)."""
