"""A data set split over clients: what a worker maps once and every client reads its rows of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.local import LocalData
from fedsim.data.partition import Shards


@dataclass(frozen=True)
class FederatedData:
    """``dataset`` with the training rows of each client, and what each client is measured on.

    That is either ``holdout``, rows of the training samples, or ``local_test``, rows of the common test set.
    """

    dataset: Dataset
    shards: Shards
    holdout: Shards | None = None
    local_test: Shards | None = None

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.shards.offsets) - 1

    def to(self, device: str) -> FederatedData:
        """The same data on ``device`` (a no-op on the CPU)."""
        if device == "cpu":
            return self
        data = self.dataset
        train = Samples(data.train.x.to(device), data.train.y.to(device))
        test = None if data.test is None else Samples(data.test.x.to(device), data.test.y.to(device))
        return replace(self, dataset=replace(data, train=train, test=test))

    def pooled(self) -> FederatedData:
        """The same samples with one client that holds them all."""
        return replace(
            self,
            shards=_union(self.shards),
            holdout=self.holdout and _union(self.holdout),
            local_test=self.local_test and _union(self.local_test),
        )

    def client(self, client: int, dtype: torch.dtype) -> LocalData:
        """Training samples of ``client``."""
        return self._rows(self.shards.part(client), dtype)

    def client_holdout(self, client: int, dtype: torch.dtype) -> LocalData | None:
        """What ``client`` is measured on, never augmented in use; ``None`` when the run has nothing of the kind."""
        if self.local_test is not None and self.dataset.test is not None:
            rows = torch.as_tensor(self.local_test.part(client))
            return LocalData(self.dataset.test, rows, dtype, self.dataset.normalize)
        return None if self.holdout is None else self._rows(self.holdout.part(client), dtype)

    def test_data(self, dtype: torch.dtype) -> LocalData | None:
        """The common test set, if there is one."""
        if self.dataset.test is None:
            return None
        return LocalData(
            self.dataset.test, torch.arange(len(self.dataset.test)), dtype, self.dataset.normalize
        )

    def class_counts(self, client: int) -> np.ndarray:
        """Training samples of ``client`` per class, int64 (C,)."""
        labels = self.dataset.train.y[torch.as_tensor(self.shards.part(client))]
        return np.bincount(labels.cpu().numpy(), minlength=self.dataset.num_classes)

    def all_counts(self) -> np.ndarray | None:
        """Training samples of all clients together per class, int64 (C,); ``None`` where targets are no classes."""
        data = self.dataset
        if not data.num_classes or data.train.y.dim() != 1:
            return None
        return np.bincount(data.train.y.numpy()[self.shards.index], minlength=data.num_classes)

    def _rows(self, rows: np.ndarray, dtype: torch.dtype) -> LocalData:
        data = self.dataset
        return LocalData(data.train, torch.as_tensor(rows), dtype, data.normalize, data.augment)


def _union(shards: Shards) -> Shards:
    rows = np.unique(shards.index)
    return Shards(rows, np.array([0, len(rows)], dtype=np.int64))
