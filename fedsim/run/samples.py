"""The clients' data: the configured source, split, or what was handed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from fedsim.config.parts import part
from fedsim.data.dataset import Dataset, Pair, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import local_tests
from fedsim.data.partition import from_partitioner
from fedsim.data.shards import Shards, holdout
from fedsim.errors import ConfigError
from fedsim.rng import numpy_rng


def dataset(config: DictConfig) -> Dataset:
    """The configured data source."""
    return part(config.data, "data", seed=config.seed)  # type: ignore[no-any-return]


def split(config: DictConfig, data: Dataset) -> FederatedData:
    """Split ``data`` over ``num_clients`` by the configured partition; the draw is keyed by the seed."""
    labels = data.train.y.numpy() if data.train.y.dim() == 1 else np.zeros(len(data.train), dtype=np.int64)
    rng = numpy_rng(config.seed, "partition")
    cut = part(config.partition, "partition", ids=data.ids)
    if hasattr(cut, "load_partition"):
        parts = from_partitioner(labels, config.num_clients, rng, partitioner=cut)
    else:
        parts = cut(labels, config.num_clients, rng)
    return held_out(config, data, Shards.of(parts))


def owned(config: DictConfig, data: Dataset, client: int) -> FederatedData:
    """All of ``data`` as the samples of one of the ``num_clients``: where clients bring their own, others have none."""
    parts = [np.empty(0, dtype=np.int64)] * config.num_clients
    parts[client] = np.arange(len(data.train), dtype=np.int64)
    return held_out(config, data, Shards.of(parts))


def given_clients(
    config: DictConfig,
    clients: Sequence[Pair],
    test: Pair | Mapping[str, Pair] | None,
    domains: Sequence[str] | None = None,
) -> FederatedData:
    """Clients handed over as ``(x, y)`` pairs: x (n_i, ...) and y (n_i, ...) with equal trailing shapes.

    ``domains`` names the domain of each client; ``test`` may then be a pair per domain.
    """
    xs = [torch.as_tensor(x) for x, _ in clients]
    ys = [torch.as_tensor(y) for _, y in clients]
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if len(x) != len(y):
            raise ConfigError(f"clients[{i}]: x has {len(x)} samples, y has {len(y)}")
        if x.shape[1:] != xs[0].shape[1:] or y.shape[1:] != ys[0].shape[1:]:
            raise ConfigError(
                f"clients[{i}]: samples of shape {tuple(x.shape[1:])}, client 0 has {tuple(xs[0].shape[1:])}"
            )
    sizes = [len(x) for x in xs]
    ends = np.cumsum([0] + sizes).astype(np.int64)
    tests = dict(test) if isinstance(test, Mapping) else {} if test is None else {"": test}
    names = tuple(sorted({*(domains or ()), *(tests if isinstance(test, Mapping) else ())}))
    held = None
    if tests:
        held = Samples(*(torch.cat([torch.as_tensor(pair[i]) for pair in tests.values()]) for i in (0, 1)))
    groups = {"train": {"domain": _codes(names, domains or (), sizes)}} if names else {}
    if isinstance(test, Mapping):
        groups["test"] = {"domain": _codes(names, list(tests), [len(y) for _, y in tests.values()])}
    y = torch.cat(ys)
    kinds = {"groups": groups, "group_names": {"domain": names}} if names and domains else {}
    seen = y if held is None or held.y.dim() != 1 or y.dim() != 1 else torch.cat([y, held.y.to(y)])
    data = Dataset(Samples(torch.cat(xs), y), held, classes=_classes(seen), **kinds)  # type: ignore[arg-type]
    return held_out(config, data, Shards(np.arange(ends[-1], dtype=np.int64), ends))


def _codes(names: Sequence[str], values: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    return np.repeat(np.array([names.index(v) for v in values], dtype=np.int64), sizes)


def _classes(y: Tensor) -> tuple[str, ...]:
    labels = y.dim() == 1 and not y.is_floating_point() and len(y)
    return tuple(map(str, range(int(y.max()) + 1))) if labels else ()


def held_out(config: DictConfig, data: Dataset, shards: Shards) -> FederatedData:
    """``data`` dealt out by ``shards``, with what each client is measured on set aside as configured."""
    fraction, own = config.evaluation.holdout, config.evaluation.clients_on == "domain"
    if own and config.evaluation.clients_every and data.domain("test") is None:
        raise ConfigError(
            "evaluation.clients_on=domain: this data set has no test samples with domains; type holdout"
        )
    if config.evaluation.local_test:
        return FederatedData(data, shards, local_test=_local_tests(config.seed, data, shards))
    if not fraction:
        return FederatedData(data, shards, own_domain=own)
    train, held = holdout(shards, fraction, lambda i: numpy_rng(config.seed, "holdout", 0, i))
    return FederatedData(data, train, held, own_domain=own)


def _local_tests(seed: int, data: Dataset, shards: Shards) -> Shards:
    if data.test is None or not data.num_classes or data.test.y.dim() != 1:
        raise ConfigError(
            "evaluation.local_test=true: needs a test set with class labels, which this data set has not; "
            "give evaluation.holdout=0.2 instead"
        )
    counts = shards.counts(data.train.y.numpy(), data.num_classes)
    return local_tests(counts, data.test.y.numpy(), lambda i: numpy_rng(seed, "local test", 0, i))


def classes_to_count(config: DictConfig, data: Dataset) -> int:
    """The number of classes if they are to be measured one by one, else 0."""
    if not config.evaluation.by_class:
        return 0
    if not data.num_classes or data.train.y.dim() != 1:
        raise ConfigError("evaluation.by_class=true: this data set has no class labels; leave it false")
    return data.num_classes


def example(data: FederatedData, dtype: torch.dtype) -> Batch:
    """Two training samples as the model gets them, for whoever needs shapes."""
    train = data.dataset.train
    rows = torch.arange(len(train))
    return LocalData(train, rows, dtype, data.dataset.normalize).read(rows[:2])
