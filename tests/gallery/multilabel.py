"""Several labels a sample: binary cross entropy, F1, and AUROC of torchmetrics, exact over workers."""

import torch
from torch import nn
from torchmetrics.classification import MultilabelAUROC

import fedsim

x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
y = (x @ torch.randn(8, 5, generator=torch.Generator().manual_seed(1)) > 0).long()


def example(settings: list[str]) -> fedsim.RunResult:
    return fedsim.simulate(
        ["task=multilabel", "num_clients=5", "partition=iid", "client.lr=0.5", *settings],
        model=lambda: nn.Linear(8, 5),
        data=(x[:500], y[:500]),
        test=(x[500:], y[500:]),
        metrics={"auroc": MultilabelAUROC(num_labels=5)},
    )
