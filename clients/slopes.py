"""Slopes of the loss along a direction, without backpropagation.

Central difference, ``[L(theta + eps z) - L(theta - eps z)] / (2 eps)``, of error O(eps^2); forward difference,
``[L(theta + eps z) - L(theta)] / eps``, of error O(eps); or the exact slope by forward-mode differentiation (``jvp``).
The model is in evaluation mode, the batch the same on both sides, and every point is formed from an untouched theta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.data.local import Batch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Refusal
from fedsim.local.job import Job
from fedsim.task.fixed import BATCH_NORM
from fedsim.task.task import Task

MEASURES = ("central", "forward", "jvp")


def slope(loss: Callable[[Tensor], float], theta: Tensor, z: Tensor, eps: float) -> float:
    """The central difference of ``loss`` at ``theta`` (d,) along ``z`` (d,); 0 where it is not finite."""
    return _finite((loss(theta + eps * z) - loss(theta - eps * z)) / (2 * eps))


def _finite(c: float) -> float:
    return c if math.isfinite(c) else 0.0


class Probe:
    """Measures slopes at points of a job's model, and counts what that costs.

    ``theta`` (d,) is where the model stands; ``at`` moves it. Works in the job's resident vector and holds no other.
    Use it as ``with Probe(...) as probe``: inside, the model is in evaluation mode.
    """

    def __init__(self, job: Job, theta: Tensor, buffers: Tensor | None, eps: float, measure: str) -> None:
        self.job, self.theta, self.eps, self.measure = job, theta, eps, measure
        self.nonfinite = self.measured = 0
        self._model = job.model
        self._model.load(theta, buffers)
        self._here: tuple[Batch, float] | None = None  # a batch and its loss at theta
        self._again: Callable[[], None] | None = None  # to be called before each pass
        self._stack = ExitStack()

    def __enter__(self) -> Probe:
        if self._model.settled:  # else what the model keeps beside its weights must follow them: loss by loss
            self._stack.enter_context(self._evaluating())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def batches(self, count: int) -> Iterator[Batch]:
        """``count`` mini-batches of the client's samples, drawn anew each round, each counted as a local step.

        Raises:
            Refusal: for a client without samples.
        """
        job, local = self.job, self.job.local
        if not len(job.data):
            raise Refusal("no samples")
        for block in job.data.blocks(
            local.batch_size, epochs=1, steps=count, shuffle=local.shuffle, rng=job.rng("batches")
        ):
            for batch in block:
                job.meter.steps += 1
                job.meter.samples += batch.size
                yield batch

    def at(self, theta: Tensor) -> None:
        """Go on from another point."""
        self.theta, self._here = theta, None

    def slope(self, batch: Batch, z: Tensor) -> float:
        """The slope along ``z`` (d,) on ``batch``; 0 where it is not finite, which is counted."""
        if self.measure == "jvp":
            base, c = self._jvp(batch, z)
        elif self.measure == "forward":
            base = self._base(batch)
            c = (self._loss(batch, z, self.eps) - base) / self.eps
        else:
            up, down = self._loss(batch, z, self.eps), self._loss(batch, z, -self.eps)
            base, c = (up + down) / 2, (up - down) / (2 * self.eps)
        self.job.meter.losses.append(torch.tensor(base, dtype=torch.float64))
        self.measured += 1
        self.nonfinite += not math.isfinite(c)
        return _finite(c)

    @property
    def blind(self) -> bool:
        """Whether slopes were measured, and none of them was finite."""
        return 0 < self.measured == self.nonfinite

    def report(self, **more: float) -> dict[str, float]:
        """Metrics of the job, with the number of slopes that were not finite."""
        return {**self.job.report(), "nonfinite_slopes": float(self.nonfinite), **more}

    def _base(self, batch: Batch) -> float:
        if self._here is None or self._here[0] is not batch:
            self._here = batch, self._loss(batch, None, 0.0)
        return self._here[1]

    def _loss(self, batch: Batch, z: Tensor | None, step: float) -> float:
        """Loss of ``batch`` at ``theta + step z``."""
        if z is None:
            self._model.w.copy_(self.theta)
        else:
            torch.add(self.theta, z, alpha=step, out=self._model.w)
        self.job.meter.forward(batch.size)
        with nullcontext() if self._again else self._evaluating():
            self._again()  # type: ignore[misc]
            with self._precision():
                return float(self.job.task.value(self._model.module, batch).item())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self._model.measuring(self._model.w) as self._again:
            try:
                self._check_statistics()
                yield
            finally:
                self._again = None

    def _check_statistics(self) -> None:
        """Refuse BatchNorm that uses its batch: the loss at one point would depend on what was measured before."""
        if not self.job.layout.batch_norm:
            return
        for name, m in self._model.module.named_modules():
            if isinstance(m, BATCH_NORM) and m.training:
                raise ClientError(
                    f"model: BatchNorm '{name}' stays in training mode under eval(); slopes need fixed statistics: do "
                    "not override train(), or use GroupNorm (model.norm=group)"
                )

    def _precision(self) -> AbstractContextManager[object]:
        kind = self._model.autocast
        return nullcontext() if kind is None else torch.autocast(self._model.w.device.type, kind)

    def _jvp(self, batch: Batch, z: Tensor) -> tuple[float, float]:
        """Loss and slope by forward-mode differentiation; attention by the kernel that has it."""
        model, named = self._model, self.job.layout.named
        model.w.copy_(self.theta)
        self.job.meter.forward(2 * batch.size)
        whole = _Value(model.module, self.job.task)

        def value(params: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(whole, params, (batch,))  # type: ignore[no-any-return]

        at, along = ({f"module.{k}": v for k, v in named(t).items()} for t in (self.theta, z))
        try:
            with nullcontext() if self._again else self._evaluating():
                self._again()  # type: ignore[misc]
                with sdpa_kernel(SDPBackend.MATH), self._precision():
                    found: tuple[Tensor, ...] = torch.func.jvp(value, (at,), (along,))
        except NotImplementedError as error:
            raise ClientError(
                f"strategy.measure=jvp: a layer of the model has no forward mode ({error}); type "
                "strategy.measure=central"
            ) from error
        return float(found[0].item()), float(found[1].item())


class _Value(nn.Module):
    """A model as a module that gives a batch's loss."""

    def __init__(self, module: nn.Module, task: Task) -> None:
        super().__init__()
        self.module, self._task = module, task

    def forward(self, batch: Batch) -> Tensor:
        return self._task.value(self.module, batch)
