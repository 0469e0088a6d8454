"""What a client has: its samples, by what each is for, and its draws."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fedsim import rng
from fedsim.config.schema import ClientConfig
from fedsim.data.federated import FederatedData
from fedsim.data.local import LocalData
from fedsim.exchange.privacy import Privacy
from fedsim.local.sample_noise import Records
from fedsim.task.task import Task, target
from fedsim.task.vectors import FlatModel


class Belongings:
    """The samples of a job's client; part of ``Job``."""

    client: int
    model: FlatModel
    source: FederatedData
    purpose: str
    task: Task
    local: ClientConfig
    seed: int
    round: int
    private: Privacy | None

    @cached_property
    def data(self) -> LocalData:
        """This client's training samples; of partly labelled data those with labels."""
        return self.source.client(self.client, self.model.w.dtype)

    @cached_property
    def unlabelled(self) -> LocalData | None:
        """Its samples without labels, whose batches have no ``y``; ``None`` where all data have (``data.labelled``)."""
        return self.source.unlabelled(self.client, self.model.w.dtype)

    @cached_property
    def validation(self) -> LocalData | None:
        """What this client may choose by (``evaluation.client_validation``); ``None`` when the run has none."""
        return self.source.client_validation(self.client, self.model.w.dtype)

    @cached_property
    def holdout(self) -> LocalData | None:
        """What this client is measured on, never trained on (see ``evaluation``); ``None`` when the run has none.

        Where validation or training samples are measured on, those.
        """
        return self.source.client_holdout(self.client, self.model.w.dtype, self._measured_on)

    @property
    def domain(self) -> int:
        """Number of this client's domain; -1 without (no domains, no samples, or samples of several)."""
        return int(self.source.client_domains[self.client])

    @property
    def test(self) -> LocalData | None:
        """The common test set, if there is one; the validation set where that is measured on."""
        return self.source.test_data(self.model.w.dtype, self._measured_on)

    @property
    def _measured_on(self) -> str:
        return self.purpose.rpartition("/")[0]  # see ``Server.on``

    @property
    def class_counts(self) -> Tensor:
        """This client's training samples per class, int64 (C,)."""
        return torch.from_numpy(self.source.class_counts(self.client)).to(self.model.w.device)

    def weight(self, weighting: str) -> float:
        """Aggregation weight: the number of samples (``samples``; of tokens, where the task counts those) or 1
        (``uniform``)."""
        return self.units(self.data) if weighting == "samples" else 1.0

    def units(self, data: LocalData) -> float:
        """How many samples (tokens, where the task counts those) ``data`` has."""
        if self.task.count is None:
            return float(len(data))
        rows = torch.split(torch.arange(len(data)), 512)
        return sum(self.task.units(target(data.read(r)), len(r)) for r in rows)

    def rng(self, purpose: str, *numbers: int) -> torch.Generator:
        """A generator of this client's own, keyed by (seed, purpose, round, client, numbers)."""
        return rng.torch_rng(self.seed, f"{self.purpose}/{purpose}", self.round, self.client, *numbers)

    @cached_property
    def noisy(self) -> Records:
        """Gradients under ``privacy=record``."""
        assert self.private is not None
        expected = max(1, min(self.local.batch_size, len(self.data)))
        return Records(self.private, self.model, self.task, self.rng, expected)
