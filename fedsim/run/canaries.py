"""Canaries: samples of which a coin decides whether they are trained on, to find out afterwards whether one can tell.

Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from fedsim.data.dataset import Samples
from fedsim.data.federated import FederatedData
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError
from fedsim.rng import numpy_rng, uniforms


def present(config: DictConfig) -> np.ndarray:
    """Which of the m canaries are in, bool (m,): a fair coin each, keyed by (seed, canary)."""
    return uniforms(int(config.seed), "canary", np.arange(int(config.audit.canaries))) < 0.5


def guesses(config: DictConfig) -> list[int]:
    """Numbers of guesses, fixed before the run: of one, or the best of several."""
    given = config.audit.guesses
    return [int(given)] if isinstance(given, int) else [int(r) for r in given]


def check(config: DictConfig) -> None:
    """Refuse canaries that nothing could be concluded from.

    Raises:
        ConfigError: naming the key, and what to type.
    """
    m = int(config.audit.canaries)
    if not m:
        return
    given = config.audit.guesses
    rs = [given] if isinstance(given, int) else list(given or [])
    if not rs or any(type(r) is not int or r % 2 or not 0 < r <= m for r in rs):
        raise ConfigError(
            f"audit.guesses={given}: must be even and at most audit.canaries={m}; one number, or a list of which the "
            "best is corrected for"
        )
    if config.audit.level == "client" and config.topology:
        raise ConfigError("audit.level=client: peers lie on a graph of num_clients; type audit.level=sample")
    if config.data.get("labelled") and config.data.labelled.get("at"):
        raise ConfigError("audit.canaries: not together with data.labelled; leave one of them out")


def planted(config: DictConfig, data: FederatedData) -> FederatedData:
    """``data`` with all canaries as the last training samples, of which clients hold those that are in.

    Raises:
        ConfigError: where samples are no tensors in memory with class labels.
    """
    m = int(config.audit.canaries)
    if not m:
        return data
    dataset = data.dataset
    train, labels = dataset.train, dataset.class_labels()
    if (
        not isinstance(train, Samples)
        or not isinstance(train.x, Tensor)
        or labels is None
        or dataset.num_classes < 2
    ):
        raise ConfigError("audit.canaries: needs samples in memory, one tensor each, with class labels")
    like, x, y = _drawn(config, data, train.x, labels)
    groups = {
        split: {k: np.concatenate((v, v[like])) if split == "train" else v for k, v in columns.items()}
        for split, columns in dataset.groups.items()
    }
    ids = None if dataset.ids is None else np.concatenate((dataset.ids, dataset.ids[like]))
    wider = Samples(torch.cat([train.x, x]), torch.cat([labels, y]))
    data = replace(data, dataset=replace(dataset, train=wider, groups=groups, ids=ids))
    return (_as_clients if config.audit.level == "client" else _dealt)(config, data, len(train))


def size(config: DictConfig) -> int:
    """Samples of a canary: one, or of a client of its own a batch."""
    return int(config.client.batch_size) if config.audit.level == "client" else 1


def _dealt(config: DictConfig, data: FederatedData, first: int) -> FederatedData:
    """Those that are in dealt to the clients one after another; rows of canaries begin at ``first``."""
    there = present(config)
    clients = [c for c in range(data.num_clients) if c not in data.roles.absent]
    owner = np.array([clients[i % len(clients)] for i in range(len(there))])
    parts = [
        np.concatenate((data.shards.part(c), first + np.flatnonzero(there & (owner == c))))
        for c in range(data.num_clients)
    ]
    return replace(data, shards=Shards.of(parts))


def _as_clients(config: DictConfig, data: FederatedData, first: int) -> FederatedData:
    """Each canary a client after all others; those that are out are never there (as by ``exclude``)."""
    there, own, old = present(config), size(config), data.num_clients

    def wider(shards: Shards | None) -> Shards | None:
        """The same clients, and new ones without samples."""
        if shards is None:
            return None
        ends = np.full(len(there), shards.offsets[-1], dtype=np.int64)
        return Shards(shards.index, np.concatenate((shards.offsets, ends)))

    rows = [first + i * own + np.arange(own if here else 0) for i, here in enumerate(there)]
    parts = [*(data.shards.part(c) for c in range(old)), *rows]
    roles = replace(
        data.roles,
        absent=data.roles.absent | {old + i for i in np.flatnonzero(~there).tolist()},
        client_validation=wider(data.roles.client_validation),
        newcomers=wider(data.roles.newcomers),
        dealt=wider(data.roles.dealt),
    )
    return replace(
        data,
        shards=Shards.of(parts),
        holdout=wider(data.holdout),
        local_test=wider(data.local_test),
        roles=roles,
    )


def _drawn(
    config: DictConfig, data: FederatedData, inputs: Tensor, labels: Tensor
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Training rows (m,) that canaries are made of or stand beside, and the canaries' inputs and labels."""
    rng, classes = numpy_rng(int(config.seed), "canary/samples"), data.dataset.num_classes
    m, rows = int(config.audit.canaries) * size(config), np.arange(len(labels))
    if data.roles.unused is not None:  # not made of samples that nobody uses
        rows = np.delete(rows, data.roles.unused)
        inputs, labels = inputs[torch.from_numpy(rows)], labels[torch.from_numpy(rows)]
    drawn = rng.choice(len(rows), m, replace=m > len(rows))
    at, like = torch.from_numpy(drawn), rows[drawn]
    x, y = inputs[at].clone(), labels[at].clone()
    if config.audit.kind == "random":
        low, high = float(inputs.min()), float(inputs.max())
        shape = (m, *inputs.shape[1:])
        whole = not inputs.is_floating_point()
        noise = rng.integers(int(low), int(high) + 1, shape) if whole else rng.uniform(low, high, shape)
        x = torch.from_numpy(noise).to(inputs.dtype)
        y = torch.from_numpy(rng.integers(classes, size=m)).to(labels.dtype)
    elif config.audit.kind == "mislabelled":
        y = (y + torch.from_numpy(rng.integers(1, classes, size=m))) % classes
    return like, x, y
