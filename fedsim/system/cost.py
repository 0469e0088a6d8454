"""What a sample costs a device: a unit, or the model's floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.data.local import Batch
from fedsim.data.trees import Tree
from fedsim.errors import ConfigError
from fedsim.models.split import call
from fedsim.task.copies import copied
from fedsim.task.fixed import converted
from fedsim.task.losses import Forward
from fedsim.task.task import Task


@dataclass(frozen=True)
class Cost:
    """Units of work per sample: of a ``gradient`` (forward and backward pass), and of a ``forward`` pass alone."""

    gradient: float
    forward: float

    def units(self, gradients: float, forwards: float) -> float:
        """Work of so many samples of either kind."""
        return self.gradient * gradients + self.forward * forwards


SAMPLES = Cost(1.0, 1 / 3)  # a backward pass is twice a forward pass


def forward_flops(model: nn.Module, x: Tree, run: Forward = call) -> int:
    """Flops of a forward pass over ``x``, as torch counts them; the model stays in its mode."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        run(model, x)
    return int(counter.get_total_flops())


def count_flops(task: Task, dtype: torch.dtype, batch: Batch) -> Cost:
    """Flops per sample of the model of ``task``, as torch counts them: matrix products and convolutions.

    Raises:
        ConfigError: if torch counts none.
    """
    model = converted(copied(task.model), dtype, "cpu").train()
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as whole:
        with FlopCounterMode(display=False) as forward:
            loss = task.value(model, batch)
        torch.autograd.backward(loss)
    if not whole.get_total_flops():
        raise ConfigError(
            "system.work=flops: torch counts no flops in this model (it counts matrix products and convolutions); "
            "use system.work=samples"
        )
    return Cost(whole.get_total_flops() / batch.size, forward.get_total_flops() / batch.size)
