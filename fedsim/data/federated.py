"""A data set split over clients: what a worker maps once and every client reads its rows of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim.data.dataset import Dataset, Samples, taken
from fedsim.data.local import LocalData
from fedsim.data.partition import Shards
from fedsim.data.sample_roles import Roles, left_out, withheld, without_labels, without_rows
from fedsim.data.shards import Stated
from fedsim.data.skew import LabelSkew, skew_of_shards
from fedsim.data.trees import Tree, tree_map
from fedsim.errors import DataError


@dataclass(frozen=True)
class FederatedData:
    """``dataset`` with the training rows of each client, and what each client is measured on.

    That is ``holdout``, rows of the training samples, or ``local_test``, rows of the common test set, or, with
    ``own_domain``, the test samples of its domain.
    """

    dataset: Dataset
    shards: Shards
    holdout: Shards | None = None
    local_test: Shards | None = None
    own_domain: bool = False
    roles: Roles = field(default_factory=Roles)  # what other samples are for
    counted: bool = True  # whether who holds this knows how many samples of each class there are

    @cached_property
    def client_domains(self) -> np.ndarray:
        """Domain of each client ``(m,)``; -1 for one without samples, with samples of several, or without domains."""
        domain, shards = self.dataset.domain("train"), self.shards
        out = np.full(self.num_clients, -1, dtype=np.int64)
        if domain is None:
            return out
        if self.roles.unlabelled is not None:
            shards = self.dealt
        owner = np.repeat(np.arange(self.num_clients), shards.sizes)
        last = out.copy()
        out[:] = len(self.dataset.domains)
        np.minimum.at(out, owner, domain[shards.index])
        np.maximum.at(last, owner, domain[shards.index])
        return np.where(out == last, out, -1)

    @property
    def domain_names(self) -> list[str | None] | None:
        """The domain of each client by name; ``None`` for a data set without domains."""
        names = self.dataset.domains
        return [names[d] if d >= 0 else None for d in self.client_domains.tolist()] if names else None

    @cached_property
    def test_rows(self) -> Tensor:
        """Test samples domain by domain (``(n,)`` positions); in their own order where there are no domains."""
        domain = self.dataset.domain("test")
        if domain is None:
            return torch.arange(len(self.dataset.test or ()))
        return torch.from_numpy(np.argsort(domain, kind="stable"))

    @cached_property
    def test_domains(self) -> dict[str, slice]:
        """Where the samples of each domain lie in ``test_rows``; only domains that have any."""
        domain = self.dataset.domain("test")
        if domain is None:
            return {}
        ends = np.cumsum(np.bincount(domain, minlength=len(self.dataset.domains))).tolist()
        spans = zip(self.dataset.domains, [0, *ends], ends, strict=False)
        return {name: slice(a, b) for name, a, b in spans if b > a}

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.shards.offsets) - 1

    def to(self, device: str) -> FederatedData:
        """The same data on ``device`` (a no-op on the CPU)."""
        if device == "cpu":
            return self
        data = self.dataset
        test = None if data.test is None else data.test.to(device)
        moved = replace(data, train=data.train.to(device), test=test)
        return replace(self, dataset=moved, roles=self.roles.to(device))

    def pooled(self) -> FederatedData:
        """The same samples with one client that holds them all."""
        return replace(
            self,
            shards=_union(self.shards),
            holdout=self.holdout and _union(self.holdout),
            local_test=self.local_test and _union(self.local_test),
            roles=self.roles.of_one(_union),
        )

    def without(self, clients: Collection[int]) -> FederatedData:
        """The same data of which nobody uses the samples of ``clients``, all else staying as it is."""
        roles = replace(self.roles.left_out(clients), dealt=self.dealt)
        held, tests = self.holdout, self.local_test
        return replace(
            self,
            shards=left_out(self.shards, clients),
            holdout=held and left_out(held, clients),
            local_test=tests and left_out(tests, clients),
            roles=roles,
        )

    def lacking(self, rows: Mapping[int, np.ndarray]) -> FederatedData:
        """The same data of which clients do not use the ``rows`` that are named for them, all else staying as it is."""
        held = self.holdout
        return replace(
            self,
            shards=without_rows(self.shards, rows),
            holdout=held and without_rows(held, rows),
            roles=replace(self.roles.lacking(rows), dealt=self.dealt),
        )

    @property
    def present(self) -> Dataset:
        """The data set without the training samples that nobody uses, where samples lie in memory: a copy."""
        train, unused = self.dataset.train, self.roles.unused
        if unused is None or not isinstance(train, Samples):
            return self.dataset
        rows = np.delete(np.arange(len(train)), unused)
        return replace(self.dataset, train=Samples(*train.take(torch.from_numpy(rows))))

    def handed(self) -> FederatedData:
        """What clients and workers may hold of it: neither withheld labels nor the server's samples."""
        roles, dataset = self.roles, self.dataset
        if roles.truth is None and roles.server is None:
            return self
        if roles.server is not None and roles.server.samples is None:
            dataset = replace(dataset, train=withheld(dataset.train, roles.server.rows.numpy()))
        return replace(self, dataset=dataset, roles=replace(roles, truth=None, server=None))

    @property
    def registered(self) -> np.ndarray:
        """Samples (m,) of every registered client to train on, with and without labels."""
        return self.dealt.sizes

    def truth_of(self, client: int) -> Tree:
        """The targets (n, ...) of the unlabelled samples of ``client``, which it has not."""
        assert self.roles.unlabelled is not None
        rows = torch.from_numpy(self.roles.unlabelled.part(client))
        return tree_map(lambda t: taken(t, rows), self.roles.truth)

    def all_labels(self) -> Tensor | None:
        """Class (N,) of every training sample, withheld ones among them; ``None`` where targets are no classes."""
        known = self.dataset.class_labels()
        return known if self.roles.truth is None or known is None else self.roles.truth

    @cached_property
    def label_skew(self) -> LabelSkew | None:
        """How the labels of what each client was dealt differ from all; ``None`` where targets are no classes, or
        nobody tells."""
        labels = self.all_labels() if self.counted else None
        return (
            None
            if labels is None
            else skew_of_shards(self.dealt, labels.cpu().numpy(), self.dataset.num_classes)
        )

    @property
    def dealt(self) -> Shards:
        """What the partition gave each client to train on, with and without labels, absent clients' included."""
        return self.roles.dealt or self.shards

    def client(self, client: int, dtype: torch.dtype) -> LocalData:
        """Training samples of ``client``."""
        return self._rows(self.shards.part(client), dtype)

    def client_holdout(self, client: int, dtype: torch.dtype, on: str = "") -> LocalData | None:
        """What ``client`` is measured on, never augmented in use; ``None`` when the run has nothing of the kind.

        With ``on`` its validation (``val``) or training samples (``train``) in place of its test samples.
        """
        if on in ("val", "train"):
            return self.client_validation(client, dtype) if on == "val" else self.client(client, dtype)
        if self.own_domain:
            return self.domain_test(client, dtype)
        if self.local_test is not None and self.dataset.test is not None:
            rows = torch.as_tensor(self.local_test.part(client))
            return LocalData(self.dataset.test, rows, dtype, self.dataset.normalize)
        return None if self.holdout is None else self._rows(self.holdout.part(client), dtype)

    def unlabelled(self, client: int, dtype: torch.dtype) -> LocalData | None:
        """Samples of ``client`` without labels, whose batches have no ``y`` (but where ``labels_known``); ``None``
        where all samples have labels."""
        if self.roles.unlabelled is None:
            return None
        data = self._rows(self.roles.unlabelled.part(client), dtype)
        return data if self.roles.labels_known else replace(data, samples=without_labels(data.samples))

    def client_validation(self, client: int, dtype: torch.dtype) -> LocalData | None:
        """What ``client`` may choose by; ``None`` when the run has nothing of the kind."""
        shards = self.roles.client_validation
        return None if shards is None else self._rows(shards.part(client), dtype)

    def newcomer(self, client: int, dtype: torch.dtype) -> LocalData:
        """All samples of a client that is held out for good."""
        assert self.roles.newcomers is not None
        return self._rows(self.roles.newcomers.part(client), dtype)

    def test_data(self, dtype: torch.dtype, on: str = "") -> LocalData | None:
        """The common test set, if there is one; with ``on`` as ``val`` the validation set, as ``attack`` the test set
        with a backdoor's trigger."""
        if on in ("val", "attack"):
            part = self.roles.validation if on == "val" else self.roles.triggered
            return None if part is None else part.read(self.dataset, dtype)
        return None if self.dataset.test is None else self._test(self.test_rows, dtype)

    def domain_test(self, client: int, dtype: torch.dtype) -> LocalData | None:
        """Test samples of the domain of ``client``; ``None`` where it has no domain or that no test samples."""
        code = int(self.client_domains[client])
        span = self.test_domains.get(self.dataset.domains[code]) if code >= 0 else None
        return None if span is None else self._test(self.test_rows[span], dtype)

    def _test(self, rows: Tensor, dtype: torch.dtype) -> LocalData:
        assert self.dataset.test is not None
        return LocalData(self.dataset.test, rows, dtype, self.dataset.normalize)

    def class_counts(self, client: int) -> np.ndarray:
        """Training samples of ``client`` per class, int64 (C,)."""
        labels = self.dataset.class_labels()
        if labels is None:
            raise DataError(
                "data: classes cannot be counted, since targets are no class labels, one a sample"
            )
        own = labels[torch.as_tensor(self.shards.part(client))]
        return np.bincount(own.cpu().numpy(), minlength=self.dataset.num_classes)

    def all_counts(self) -> np.ndarray | None:
        """Training samples of all clients together per class, int64 (C,); ``None`` where targets are no classes, or
        nobody tells."""
        labels = self.dataset.class_labels()
        if labels is None or not self.counted:
            return None
        if isinstance(self.shards, Stated):
            total: np.ndarray = self.shards.held.sum(0)
            return total
        return np.bincount(labels.numpy()[self.shards.index], minlength=self.dataset.num_classes)

    def _rows(self, rows: np.ndarray, dtype: torch.dtype) -> LocalData:
        data = self.dataset
        return LocalData(data.train, torch.from_numpy(rows), dtype, data.normalize, data.augment)


def _union(shards: Shards) -> Shards:
    rows = np.unique(shards.index)
    return Shards(rows, np.array([0, len(rows)], dtype=np.int64))
