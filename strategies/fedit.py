"""FedIT. Zhang et al.: Towards Building the Federated GPT: Federated Instruction Tuning, 2023 (arXiv 2305.05644)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fedsim.task.layout import Layout
from fedsim.task.lowrank import adapters_of
from fedsim.task.task import Task
from strategies.fedavg import FedAvg

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FedIT(FedAvg):
    """FedAvg of both factors of low-rank adapters, and of whatever else of the model is trained."""

    def setup(self, task: Task, layout: Layout) -> None:
        """Say it where there are no adapters: that is FedAvg."""
        super().setup(task, layout)
        if not adapters_of(task.model, layout):
            log.warning(
                "fedit: the model has no low-rank adapters (lora_A, lora_B), so this is FedAvg of all that is trained; "
                "model=hf 'model.lora={r: 4}' makes them, or hand over a peft model"
            )
