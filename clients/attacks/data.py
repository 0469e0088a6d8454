"""Attacks on what a client trains on. Its update is then an honest one of dishonest data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients.attacks.base import Attack
from fedsim.data.augment import Compose
from fedsim.data.dataset import Augment, Dataset
from fedsim.data.local import Batch, LocalData
from fedsim.errors import ConfigError
from fedsim.local.job import Job
from fedsim.run.augmented import check_augment


@dataclass(frozen=True)
class FlippedData(LocalData):
    """Samples whose labels ``y`` read ``C - 1 - y``."""

    classes: int = 0

    def read(self, rows: torch.Tensor, rng: torch.Generator | None = None) -> Batch:
        """As ``LocalData.read``."""
        x, y = super().read(rows, rng)
        return Batch(x, self.classes - 1 - y)


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Trains on labels ``C - 1 - y``."""

    def fitted(self, data: Dataset) -> LabelFlip:
        """Refuses data without classes; those of each pixel are classes too."""
        y = data.train.take(torch.arange(1))[1]
        if not data.num_classes or not isinstance(y, Tensor) or y.is_floating_point():
            raise ConfigError(
                "attack: flipping labels needs class labels, which this data set has not; leave attack out"
            )
        return self

    def prepare(self, job: Job) -> None:
        """Flip this client's labels."""
        data, classes = job.data, job.source.dataset.num_classes
        job.data = FlippedData(
            data.samples, data.index, data.dtype, data.normalize, data.augment, classes=classes
        )


@dataclass(frozen=True, kw_only=True)
class AugmentedData(Attack):
    """Trains on augmented samples, like some workers in the flag aggregator's experiments."""

    augment: Augment

    def fitted(self, data: Dataset) -> AugmentedData:
        """Refuses data that it cannot augment."""
        check_augment(self.augment, data, "attack")
        return self

    def prepare(self, job: Job) -> None:
        """Augment, after the augmentation that all clients use."""
        own = job.data.augment
        job.data = replace(job.data, augment=Compose((own, self.augment)) if own else self.augment)
