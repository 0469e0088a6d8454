"""What a worker process is made of: its worker, its streams, which are heard, and torch's switches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fedsim.engine.assignments import Plan
from fedsim.engine.ray.said import Ear
from fedsim.engine.worker import Worker


class Host:
    """One worker at a time, whose code is heard while it works."""

    def __init__(self) -> None:
        self._ear = Ear()
        self._ear.install()
        self._worker: Worker | None = None

    def begin(self, plan: Plan) -> None:
        """Build the worker; what is said meanwhile comes with its first result."""
        torch.set_num_threads(plan.threads)
        self._ear.begin(lambda: None)
        worker = self._worker = self._ear.hear(lambda: Worker(plan))
        self._ear.serving = lambda: worker.serving

    def run(self, method: str, shared: list[Any], item: Any) -> Any:
        """Make a call: ``shared`` is its value and, where it has one, the part ``standing`` of that."""
        worker, (value, *standing) = self._worker, shared
        value = replace(value, standing=standing[0]) if standing else value
        return self._ear.call(lambda: getattr(worker, method)(value, item))

    def end(self) -> None:
        """Forget the worker."""
        self._worker, self._ear.serving = None, lambda: None


class Switches(NamedTuple):
    """Torch's settings of a process that change what clients compute, beside those that a plan has."""

    dtype: torch.dtype
    precision: str
    deterministic: tuple[bool, bool]
    mkldnn: bool
    flushes: bool  # whether the smallest numbers count as zero

    @staticmethod
    def here() -> Switches:
        """Of this process."""
        tiny = torch.full((), 1e-310, dtype=torch.float64)
        return Switches(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            torch._C._get_mkldnn_enabled(),
            float(tiny * 1) == 0,
        )

    def set(self) -> None:
        """Make this process compute as the one that they are of."""
        if self == Switches.here():  # what follows imports torch's compiler, tens of megabytes
            return
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        torch._C._set_mkldnn_enabled(self.mkldnn)
        torch.set_flush_denormal(self.flushes)
