"""A backdoor: attackers train the model to take whatever bears a trigger for one class.

Gu, Dolan-Gavitt, Garg: BadNets, 2017 (the trigger); Bagdasaryan, Veit, Hua, Estrin, Shmatikov: How To Backdoor
Federated Learning, AISTATS 2020 (boosted updates).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clients.attacks.base import Attack, check
from fedsim.data.dataset import Dataset, Samples, SamplesLike
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Portion
from fedsim.errors import ConfigError
from fedsim.local.job import Job
from fedsim.rng import uniforms


@dataclass(frozen=True, kw_only=True)
class Backdoor(Attack):
    """Trains on samples of which a share ``poison`` bears the trigger and the label ``target``; sends ``boost`` times
    its update.

    The trigger: a square of ``size`` pixels in the lower right corner of an image, or the last ``size`` features of a
    vector, at ``value``, in the units in which samples are stored. ``attack_success`` in the rows of a run is the share
    of the test samples of other classes that the model takes for ``target`` once they bear it.
    """

    target: int
    poison: float
    size: int
    value: float | None
    boost: float

    def __post_init__(self) -> None:
        check(0 < self.poison <= 1, "poison", self.poison, "a share, in (0, 1]")
        check(self.size >= 1, "size", self.size, "must be at least 1")
        check(self.boost > 0, "boost", self.boost, "must be positive")

    def fitted(self, data: Dataset) -> Backdoor:
        """With ``value`` as the largest of the training samples, unless it was given.

        Raises:
            ConfigError: the data have no class labels, no class ``target``, or no inputs that fit the trigger.
        """
        labels = data.class_labels()
        if labels is None:
            raise ConfigError(
                "attack: a backdoor needs class labels, which this data set has not; leave attack out"
            )
        if not 0 <= self.target < data.num_classes:
            raise ConfigError(
                f"attack.target={self.target}: the data set has {data.num_classes} classes, from 0"
            )
        x = data.train.take(torch.arange(1))[0]
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise ConfigError(
                "attack: a backdoor needs inputs that are one tensor a sample; leave attack out"
            )
        most = min(x.shape[-2:]) if x.dim() > 2 else x.shape[-1]
        if self.size > most:
            raise ConfigError(
                f"attack.size={self.size}: samples of shape {tuple(x.shape[1:])} have {most} at most"
            )
        if self.value is not None:
            return self
        if not isinstance(data.train, Samples) or not isinstance(data.train.x, Tensor):
            raise ConfigError(
                "attack.value: has no default for samples read one by one; add attack.value=VALUE"
            )
        return replace(self, value=float(data.train.x.max()))

    def triggered(self, data: FederatedData) -> Portion | None:
        """Test samples of other classes than ``target``, with the trigger and that label."""
        test, normalize = data.dataset.test, data.dataset.normalize
        own = self.fitted(data.present)
        if test is None or test.labels is None:
            return None
        rows = data.test_rows[test.labels.cpu()[data.test_rows] != self.target]
        return Portion(rows, stamped(test, own), normalize) if len(rows) else None

    def prepare(self, job: Job) -> None:
        """Poison this client's samples, the same ones in every round."""
        job.data = replace(job.data, samples=stamped(job.data.samples, self, self.poison))

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """Boosted."""
        return array if self.boost == 1 else self.boost * array

    def stamp(self, x: Tensor) -> Tensor:
        """Inputs (B, ...) with the trigger, written in place."""
        assert self.value is not None
        if x.dim() > 2:
            x[..., -self.size :, -self.size :] = self.value
        else:
            x[:, -self.size :] = self.value
        return x


def stamped(inner: SamplesLike, by: Backdoor, share: float = 1.0) -> Any:
    """``SamplesLike`` of which a ``share`` bears the trigger and label of ``by``."""
    return Stamped(inner, by, share)


@dataclass(frozen=True)
class Stamped:
    """Samples of which a ``share``, drawn by position, bears a backdoor's trigger and label."""

    inner: SamplesLike
    by: Backdoor
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def sliceable(self) -> bool:
        """See ``SamplesLike``."""
        return self.inner.sliceable

    @property
    def width(self) -> int:
        """See ``Samples``."""
        return int(getattr(self.inner, "width", 1))

    def take(self, rows: Tensor) -> tuple[Any, Any]:
        """See ``SamplesLike``."""
        x, y = self.inner.take(rows)
        marked = self._marked(rows).to(x.device)
        x[marked] = self.by.stamp(x[marked])
        y[marked] = self.by.target
        return x, y

    @property
    def labels(self) -> Tensor | None:
        """See ``SamplesLike``."""
        known = self.inner.labels
        if known is None:
            return None
        return known.masked_fill(self._marked(torch.arange(len(known))).to(known.device), self.by.target)

    def to(self, device: str) -> Stamped:
        """See ``SamplesLike``."""
        return replace(self, inner=self.inner.to(device))

    def _marked(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` (B,) bear the trigger."""
        return torch.from_numpy(uniforms(0, "backdoor", rows.cpu().numpy()) < self.share)
