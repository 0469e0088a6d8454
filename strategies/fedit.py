"""FedIT. Zhang et al.: Towards Building the Federated GPT: Federated Instruction Tuning, 2023 (arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.lowrank import adapters_of
from fedsim.task.task import Task
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedIT(FedAvg):
    """FedAvg of both factors of low-rank adapters, and of whatever else of the model is trained."""

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without adapters: that would be FedAvg under another name."""
        super().setup(task, layout)
        if not adapters_of(task.model, layout):
            raise ConfigError(
                "strategy=fedit: the model has no low-rank adapters (lora_A, lora_B) that are trained, and without "
                "them this is FedAvg; type model=hf 'model.lora={r: 4}', hand over a peft model, or strategy=fedavg"
            )
