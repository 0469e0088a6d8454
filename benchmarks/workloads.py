"""The three reference workloads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsim.models import MLP, LeNet, ResNet18


@dataclass(frozen=True)
class Workload:
    """FedAvg, one local epoch of plain SGD, equal clients."""

    name: str
    clients: int
    samples: int  # per client
    cohort: int
    batch: int
    shape: tuple[int, ...]
    lr: float
    segment: int  # rounds timed at a stretch
    seed: int = 0

    def model(self) -> nn.Module:
        """The initial model, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.name == "M":
                return MLP(self.shape, 10, [200])
            if self.name == "L":
                return LeNet(self.shape, 10)
            return ResNet18(self.shape, 10, norm="group", groups=32, stem="imagenet")

    def data(self) -> tuple[Tensor, Tensor]:
        """Learnable noise: x (clients * samples, *shape), y; client i owns rows [i * samples, (i + 1) * samples)."""
        rng = torch.Generator().manual_seed(self.seed)
        y = torch.randint(10, (self.clients * self.samples,), generator=rng)
        centres = torch.randn(10, *self.shape, generator=rng)
        x = torch.randn(len(y), *self.shape, generator=rng)
        return x.add_(centres[y], alpha=0.1), y

    def loss(self, weights: dict[str, Tensor], rows: int = 2000) -> float:
        """Mean loss of a state dict on the first rows of the training data."""
        model, (x, y) = self.model(), self.data()
        model.load_state_dict(weights)
        model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x[:rows]), y[:rows]))


WORKLOADS = {
    "M": Workload("M", 1000, 50, 100, 10, (784,), 0.05, segment=10),
    "L": Workload("L", 100, 500, 10, 50, (3, 32, 32), 0.05, segment=4),
    "R": Workload("R", 100, 20, 10, 20, (3, 32, 32), 0.01, segment=4),
}


def scaled(work: Workload, segment: int | None) -> Workload:
    """The same workload with another number of rounds per segment."""
    return replace(work, segment=segment or work.segment)
