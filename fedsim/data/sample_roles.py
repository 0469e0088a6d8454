"""What samples are for, beside training and clients' own tests: validation, lacking labels, the server's, nobody's.

Rows are those of the training samples, so no role copies inputs, and the partition stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.common import SPLIT_SEED
from fedsim.data.dataset import Augment, Dataset, Normalize, Samples, SamplesLike, taken
from fedsim.data.local import LocalData
from fedsim.data.shards import Shards
from fedsim.data.trees import Tree, tree_map
from fedsim.errors import ConfigError
from fedsim.rng import numpy_rng

NO_LABEL = -100  # stands where a label is withheld: in no class, and left out by torch's cross entropy


@dataclass(frozen=True)
class Portion:
    """``rows`` (n,) int64 of ``samples``, with what is done to them when they are read; of the training samples where
    ``samples`` is ``None``."""

    rows: Tensor
    samples: SamplesLike | None = None
    normalize: Normalize | None = None
    augment: Augment | None = None
    labelled: bool = True  # else nobody can tell their targets

    def read(self, data: Dataset, dtype: torch.dtype) -> LocalData:
        """The part as a client's samples are read."""
        if self.samples is None:
            train = data.train if self.labelled else without_labels(data.train)
            return LocalData(train, self.rows, dtype, data.normalize, data.augment)
        return LocalData(self.samples, self.rows, dtype, self.normalize, self.augment)

    def to(self, device: str) -> Portion:
        """The same on ``device``."""
        return self if self.samples is None else replace(self, samples=self.samples.to(device))


@dataclass(frozen=True)
class Roles:
    """Who may read what. ``truth`` and ``server`` are the simulator's and never given to clients (``handed``)."""

    validation: Portion | None = None  # common, beside the test set
    validation_domains: Mapping[str, slice] = field(
        default_factory=dict
    )  # where each domain's samples lie in it
    client_validation: Shards | None = None  # of each client
    unlabelled: Shards | None = None  # of each client: samples whose labels it has not
    labels_known: bool = False  # it has them after all (``data.labelled.withhold=false``)
    newcomers: Shards | None = None  # all samples of the clients held out for good
    absent: frozenset[int] = frozenset()  # clients that are never asked: excluded, or held out
    unused: np.ndarray | None = None  # training samples (m,) of who or what is excluded; None: there are none
    dealt: Shards | None = None  # what the partition gave each client to train on, if that is not ``shards``
    truth: Tree = None  # targets (N, ...) of the training samples, where some of them are withheld
    server: Portion | None = None  # labelled samples of the server
    triggered: Portion | None = (
        None  # the test set with a backdoor's trigger, labelled as the attackers want it
    )

    def to(self, device: str) -> Roles:
        """The same with its samples on ``device``."""
        validation, server, triggered = self.validation, self.server, self.triggered
        return replace(
            self,
            validation=validation and validation.to(device),
            server=server and server.to(device),
            triggered=triggered and triggered.to(device),
        )

    def of_one(self, union: Callable[[Shards], Shards]) -> Roles:
        """The same where one client holds all samples: nobody else is there to be absent."""
        own, unknown, new = self.client_validation, self.unlabelled, self.newcomers
        return replace(
            self,
            absent=frozenset(),
            dealt=None,
            client_validation=own and union(own),
            unlabelled=unknown and union(unknown),
            newcomers=new and union(new),
        )

    def lacking(self, rows: Mapping[int, np.ndarray]) -> Roles:
        """The same in which clients have not the ``rows`` that are named for them."""
        own, unknown, new = self.client_validation, self.unlabelled, self.newcomers
        return replace(
            self,
            client_validation=own and without_rows(own, rows),
            unlabelled=unknown and without_rows(unknown, rows),
            newcomers=new and without_rows(new, rows),
        )

    def left_out(self, clients: Collection[int]) -> Roles:
        """The same with ``clients`` absent, their samples in no role but as ``newcomers``."""
        own, unknown = self.client_validation, self.unlabelled
        return replace(
            self,
            absent=frozenset(clients),
            client_validation=own and left_out(own, clients),
            unlabelled=unknown and left_out(unknown, clients),
        )


def in_arrays(samples: SamplesLike) -> Samples:
    """``samples``, whose targets can be told from their inputs.

    Raises:
        ConfigError: where both are read together, row by row: who can read one could read the other.
    """
    if not isinstance(samples, Samples):
        raise ConfigError(
            "data.labelled: labels that a data set gives together with each sample cannot be withheld; hand over "
            "arrays x and y (memory-mapped ones too)"
        )
    return samples


def without_labels(samples: SamplesLike) -> Samples:
    """The same inputs, of which nobody can tell the targets."""
    return Samples(in_arrays(samples).x)


def withheld(samples: SamplesLike, rows: np.ndarray) -> Samples:
    """The same inputs with another copy of the targets, in which those of ``rows`` are overwritten.

    By ``NO_LABEL``, NaN, or zero where neither can be written.
    """
    known, at = in_arrays(samples), torch.from_numpy(rows)

    def hidden(targets: Any) -> Tensor:
        y = taken(targets, torch.arange(len(targets)))
        signed = y.dtype in (torch.int16, torch.int32, torch.int64)
        y[at] = torch.nan if y.is_floating_point() else NO_LABEL if signed else 0
        return y

    return Samples(known.x, tree_map(hidden, known.y))


def class_labels(data: Dataset) -> np.ndarray | None:
    """Class of every training sample (N,); ``None`` where targets are no classes."""
    found = data.class_labels()
    return None if found is None else found.numpy()


def stratified(strata: np.ndarray | None, n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``n`` samples, ascending positions: of each stratum its share, rounded up or down.

    ``strata`` (n,) are integers from 0; ``None``: any samples. All samples are equally likely.
    """
    order = rng.permutation(n)
    if strata is not None:
        order = order[np.argsort(strata[order], kind="stable")]
    at = np.floor((np.arange(count) + rng.random()) * (n / max(count, 1))).astype(np.int64)
    return np.sort(order[np.minimum(at, n - 1)])


def validation_rows(data: Dataset, share: float) -> np.ndarray:
    """Rows of the validation set (n,), ascending: ``share`` of the training samples, of every class alike.

    The draw has a fixed key, so all seeds are validated on the same samples.

    Raises:
        ConfigError: if that is no sample, or all of them.
    """
    total = len(data.train)
    count = int(share * total + 0.5)
    if not 0 < count < total:
        least = f"give at least {1 / total:.2g}" if total > 1 and not count else "give less"
        raise ConfigError(
            f"evaluation.validation={share:g}: that is {count} of {total} training samples; {least}"
        )
    return stratified(class_labels(data), total, count, numpy_rng(SPLIT_SEED, "validation"))


def by_domain(data: Dataset, rows: np.ndarray) -> tuple[np.ndarray, dict[str, slice]]:
    """``rows`` domain by domain, and where each domain's lie; as they are in data without domains."""
    domain = data.domain("train")
    if domain is None:
        return rows, {}
    rows = rows[np.argsort(domain[rows], kind="stable")]
    ends = np.cumsum(np.bincount(domain[rows], minlength=len(data.domains))).tolist()
    spans = zip(data.domains, [0, *ends], ends, strict=False)
    return rows, {name: slice(a, b) for name, a, b in spans if b > a}


def belongings(ids: np.ndarray | None, dealt: Shards, clients: Collection[int]) -> np.ndarray | None:
    """Whether each sample (N,) is of somebody among ``clients``, by its natural id, wherever it was set apart before.

    ``None`` where samples belong to nobody before they are dealt out: without ids (N,), or where the partition has
    ``dealt`` samples of one id to several clients.
    """
    if ids is None or not clients:
        return None
    _, codes = np.unique(ids, return_inverse=True)
    owner = np.full(int(codes.max(initial=-1)) + 1, -1, dtype=np.int64)
    holder = np.repeat(np.arange(len(dealt)), dealt.sizes)
    owner[codes[dealt.index]] = holder
    together = bool((owner[codes[dealt.index]] == holder).all())
    return np.isin(owner[codes], list(clients)) if together else None


def left_out(shards: Shards, clients: Collection[int]) -> Shards:
    """``shards`` in which ``clients`` have no samples."""
    return shards.only(~_mask(len(shards), clients))


def without_rows(shards: Shards, rows: Mapping[int, np.ndarray]) -> Shards:
    """``shards`` in which clients have not the ``rows`` of the data set that are named for them."""
    gone = {c: np.isin(shards.part(c), own) for c, own in rows.items()}
    parts = [shards.part(c) if c not in gone else shards.part(c)[~gone[c]] for c in range(len(shards))]
    return Shards.of(parts)


def kept(shards: Shards, clients: Collection[int]) -> Shards:
    """``shards`` in which nobody but ``clients`` has samples."""
    return shards.only(_mask(len(shards), clients))


def _mask(clients: int, chosen: Collection[int]) -> np.ndarray:
    out = np.zeros(clients, dtype=bool)
    out[list(chosen)] = True
    return out


def only_rows(shards: Shards, rows: np.ndarray) -> Shards:
    """``shards`` of which no other than ``rows`` of the data set are left."""
    left = np.isin(shards.index, rows)
    owner = np.repeat(np.arange(len(shards)), shards.sizes)
    sizes = np.bincount(owner[left], minlength=len(shards))
    return Shards(shards.index[left], np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))
