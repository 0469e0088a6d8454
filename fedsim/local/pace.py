"""Where a client stands in its local training: which step of how many, which micro-batch of the step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedsim.data.local import Batch
from fedsim.data.trees import pieces
from fedsim.errors import ClientError
from fedsim.local.rates import RateSchedule


class Pace:
    """The position in a phase of local training, kept by ``job.batches`` for the optimisers of the job.

    ``step`` of ``horizon`` (``None`` before a phase begins); ``samples`` of the present micro-batch, which is the
    step's ``last`` or not.
    """

    def __init__(self) -> None:
        self.step = 0
        self.horizon: int | None = None
        self.samples, self.last = 1, True

    def begin(self, horizon: int) -> None:
        """A phase of ``horizon`` steps begins."""
        self.step, self.horizon = 0, horizon

    def parts(self, batch: Batch, size: int, smallest: int) -> Iterator[Batch]:
        """The micro-batches of one step's ``batch``; afterwards it is the next step."""
        parts = micro_batches(batch, size, smallest)
        for i, part in enumerate(parts):
            self.samples, self.last = part.size, i == len(parts) - 1
            yield part
        self.step += 1

    def factor(self, schedule: RateSchedule) -> float:
        """What ``schedule`` multiplies the learning rate of this step by."""
        if self.horizon is None:
            raise ClientError(
                "client.schedule: it goes by the steps of job.batches, but no batch was taken from there; use "
                "job.batches, or type client.schedule=null"
            )
        return schedule.factor(self.step, self.horizon)


class Sums:
    """What the micro-batches of one step add up to."""

    def __init__(self) -> None:
        self._total: Tensor | None = None  # of gradients (..., d) times samples
        self._samples = 0
        self._idle: tuple[slice, ...] = ()  # in all of them

    def add(self, g: Tensor, idle: tuple[slice, ...], pace: Pace) -> tuple[Tensor, tuple[slice, ...]] | None:
        """With the step's last micro-batch, the mean gradient over all its samples and where parameters lie that had
        no part in any of them; ``None`` before. ``g``, the mean gradient of one micro-batch, is consumed."""
        n = pace.samples
        if self._total is None:
            if pace.last:
                return g, idle
            self._total, self._samples, self._idle = g.mul_(n), n, idle
            return None
        self._total.add_(g, alpha=n)
        self._samples += n
        self._idle = tuple(s for s in self._idle if s in idle)
        if not pace.last:
            return None
        total, self._total = self._total, None
        return total.div_(self._samples), self._idle


def micro_batches(batch: Batch, size: int, smallest: int = 1) -> list[Batch]:
    """``batch`` in parts of at most ``size`` samples, without a last part of fewer than ``smallest``."""
    if batch.size <= size:
        return [batch]
    xs = pieces(batch.x, size)
    ys = [None] * len(xs) if batch.y is None else pieces(batch.y, size)
    parts = [Batch(x, y) for x, y in zip(xs, ys, strict=True)]
    return [part for part in parts if part.size >= smallest]
