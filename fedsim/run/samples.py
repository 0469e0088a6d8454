"""The clients' data: the configured source, split, or what was handed over."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from fedsim.config.parts import part
from fedsim.data import containers
from fedsim.data.bydomain import domain_names
from fedsim.data.dataset import Augment, Dataset, Pair, Samples
from fedsim.data.door import admit, admit_parts, check_owned, refuse_nonfinite, settled
from fedsim.data.federated import FederatedData
from fedsim.data.joining import together
from fedsim.data.labels import TargetRules
from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import local_tests
from fedsim.data.normalising import normalised
from fedsim.data.partition import from_partitioner
from fedsim.data.sample_roles import Roles, only_rows
from fedsim.data.shards import Shards, holdout
from fedsim.errors import ConfigError
from fedsim.rng import numpy_rng
from fedsim.run import agreement, assigning, initial, tasks, trial
from fedsim.run.given import Given

Model = nn.Module | Callable[[], nn.Module] | None
log = logging.getLogger(__name__)


def dataset(config: DictConfig, model: Model = None, *, own_loss: bool = False, kind: str = "") -> Dataset:
    """The configured data source, with inputs and targets as the model (configured, or handed over) takes them."""
    more = {} if agreement.of(config) is None else {"contract": agreement.node(config)}
    found = part(assigning.source(config.data), "data", seed=config.seed, **more)
    if not isinstance(found, Dataset):
        raise ConfigError(
            f"data: {config.data.get('_target_')} gave {type(found).__name__}, expected a "
            "fedsim.data.dataset.Dataset"
        )
    found = agreement.kept(config, found)
    x = getattr(found.train, "x", None)
    admitted = admit(found, TargetRules(own_loss, outputs=lambda: _outputs(config, model, x), kind=kind))
    _say_unlearnable(admitted)
    return as_taken(config, admitted, model)


def handed(config: DictConfig, given: Given) -> Dataset:
    """Data handed over to be split as configured: a ``Dataset``, or whatever one client may be given as."""
    learned = tasks.problem(config, given)
    rules = TargetRules(learned.raw, kind=learned.targets)
    if isinstance(given.data, Dataset):
        found = admit(given.data, rules)
    else:
        named = {"data": given.data} | ({} if given.test is None else {"the test set": given.test})
        parts = containers.parts(named)
        pairs, classes = admit_parts(parts, _rules(config, given, parts))
        train, *rest = (together([pair]) for pair in pairs)
        found = Dataset(train, rest[0] if rest else None, classes=tuple(classes))
    _say_unlearnable(found)
    return found if given.augment is None else replace(found, augment=given.augment)


def _say_unlearnable(data: Dataset) -> None:
    """Name a class that only test samples are of."""
    train, test = data.class_labels("train"), data.class_labels("test")
    if train is None or test is None or not len(train):
        return
    only = np.setdiff1d(test.numpy(), train.numpy())
    if len(only):
        names = ", ".join(repr(data.classes[i]) for i in only[:3] if i < len(data.classes))
        more = f" and {len(only) - 3} more" if len(only) > 3 else ""
        log.warning(
            "data: no training sample is of class %s%s, only test samples: nobody can learn it", names, more
        )


def _rules(config: DictConfig, given: Given, parts: Sequence[containers.Part]) -> TargetRules:
    """How the targets of what was handed over are to be read."""
    x = next((p.x for p in parts if len(p)), None)
    learned = tasks.problem(config, given)
    return TargetRules(learned.raw, outputs=lambda: _outputs(config, given.model, x), kind=learned.targets)


def as_taken(config: DictConfig, data: Dataset, model: Model) -> Dataset:
    """``data`` with integer inputs as numbers where the model does not look them up; an encoder takes them as is."""
    x = getattr(data.train, "x", None)
    if (
        config.encoder
        or not isinstance(x, torch.Tensor)
        or x.is_floating_point()
        or data.normalize is not None
    ):
        return data
    return trial.as_taken(data, initial.model(config, data, model), initial.DTYPES[config.dtype])


def admitted(config: DictConfig, given: Given) -> Given:
    """What was handed over, with clients and test set as pairs of tensors in their final types.

    Raises:
        ConfigError, DataError: where something cannot be read in one way only; names client, row and remedy.
    """
    if isinstance(given.test, Mapping) and given.domains is None and containers.is_one(given.test):
        given = replace(given, test=containers.halves(given.test))
    if given.domains is not None:
        given = replace(given, domains=domain_names(given.domains, given.clients, given.test))
    if given.data is not None:
        return replace(given, data=handed(config, given), test=None)
    if given.clients is None:
        return given
    clients = containers.listed(given.clients)
    binary = tasks.problem(config, given).targets == "labels"
    if not binary and (classes := _settled(clients, given.test)) is not None:
        return replace(given, clients=clients, classes=classes)
    each = isinstance(given.test, Mapping)
    tests = dict(given.test) if isinstance(given.test, Mapping) else {"": given.test}
    named = {f"client {i}": client for i, client in enumerate(clients)}
    if given.test is not None:
        named |= {f"the test set of {k!r}" if each else "the test set": t for k, t in tests.items()}
    parts = containers.parts(named)
    if not clients:
        return replace(given, clients=[])
    pairs, classes = admit_parts(parts, _rules(config, given, parts))
    own, held = pairs[: len(clients)], pairs[len(clients) :]
    test = None if given.test is None else dict(zip(tests, held, strict=True)) if each else held[0]
    columns = next((p.columns for p in parts if len(p)), ())
    return replace(given, clients=own, test=test, classes=classes, columns=columns)


def _settled(clients: Sequence[Pair], test: object) -> tuple[str, ...] | None:
    """The names of the classes if everything has its final form already; ``None`` if not."""
    if isinstance(test, Mapping):
        return None
    classes = settled([*clients, test] if test is not None else clients)
    if classes is not None and isinstance(test, tuple):
        refuse_nonfinite("the test set", test[0])
    return classes


def _outputs(config: DictConfig, model: Model, x: object) -> int | None:
    """How many classes a model that was handed over tells apart; ``None`` where it is made for the data."""
    if model is None or x is None:
        return None
    dtype = initial.DTYPES.get(config.dtype, torch.float32)
    return trial.outputs(initial.model(config, Dataset(Samples(x, x)), model), x, dtype)


def split(config: DictConfig, data: Dataset) -> FederatedData:
    """Split ``data`` over ``num_clients`` by the configured partition; the draw is keyed by the seed."""
    (rows, apart), known, ids = assigning.before(config, data), data.train.labels, data.ids
    labels = (
        np.empty((len(data.train), 0)) if known is None else known.numpy()
    )  # no labels: told by its shape
    if rows is not None:
        labels, ids = labels[rows], None if ids is None else ids[rows]
    rng = numpy_rng(config.seed, "partition")
    cut = part(config.partition, "partition", ids=ids)
    if hasattr(cut, "load_partition"):
        parts = from_partitioner(labels, config.num_clients, rng, partitioner=cut)
    else:
        _check_partition(config, cut)
        parts = cut(labels, config.num_clients, rng)
    shards = Shards.of(parts if rows is None else [rows[p] for p in parts])
    return held_out(config, data, _checked(data, shards), apart)


def _check_partition(config: DictConfig, cut: Callable[..., Any]) -> None:
    """Refuse a function of another kind than partitions are."""
    try:
        inspect.signature(cut).bind(None, 0, None)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(cut, partial):
            return  # no signature to be had
        raise ConfigError(
            f"partition._target_={config.partition.get('_target_')}: is no partition, which is called as "
            f"(labels, num_clients, rng): {error}"
        ) from error


def owned(config: DictConfig, data: Dataset, client: int) -> FederatedData:
    """All of ``data`` as the samples of one of the ``num_clients``: where clients bring their own, others have none."""
    assigning.refuse_owned(config)
    parts = [np.empty(0, dtype=np.int64)] * config.num_clients
    parts[client] = np.arange(len(data.train), dtype=np.int64)
    return held_out(config, data, _checked(data, Shards.of(parts)))


def _checked(data: Dataset, shards: Shards) -> Shards:
    """``shards`` of training inputs that are all finite."""
    check_owned(data, shards)
    return shards


def given_clients(
    config: DictConfig,
    clients: Sequence[Pair],
    test: Pair | Mapping[str, Pair] | None,
    domains: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    model: Model = None,
    augment: Augment | None = None,
) -> FederatedData:
    """Clients handed over as ``(x, y)`` pairs of tensors, as ``admitted`` gives them, put together.

    ``domains`` names the domain of each client; ``test`` may then be a pair per domain. ``classes`` are the names of
    the classes, none where targets are numbers.
    """
    sizes = [len(Samples(x)) for x, _ in clients]
    ends = np.cumsum([0] + sizes).astype(np.int64)
    tests = dict(test) if isinstance(test, Mapping) else {} if test is None else {"": test}
    names = tuple(sorted({*(domains or ()), *(tests if isinstance(test, Mapping) else ())}))
    held = None
    if tests:
        held = together(list(tests.values()))
    groups = {"train": {"domain": _codes(names, domains or (), sizes)}} if names else {}
    if isinstance(test, Mapping):
        groups["test"] = {"domain": _codes(names, list(tests), [len(Samples(x)) for x, _ in tests.values()])}
    kinds = {"groups": groups, "group_names": {"domain": names}} if names and domains else {}
    train = together(clients)
    data = Dataset(train, held, classes=tuple(classes), augment=augment, **kinds)  # type: ignore[arg-type]
    shards = _checked(data, Shards(np.arange(ends[-1], dtype=np.int64), ends))
    data = as_taken(config, data, model)
    rows, apart = assigning.before(config, data, shards)
    return held_out(config, data, shards if rows is None else only_rows(shards, rows), apart)


def _codes(names: Sequence[str], values: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    return np.repeat(np.array([names.index(v) for v in values], dtype=np.int64), sizes)


def held_out(config: DictConfig, data: Dataset, shards: Shards, apart: Roles = Roles()) -> FederatedData:  # noqa: B008
    """``data`` dealt out by ``shards``, with what each client is measured on set aside as configured.

    ``apart`` says what was set apart before.
    """
    found = assigning.assigned(config, tested(config, data, shards), shards, apart)
    return normalised(agreement.of(config), found)


def tested(config: DictConfig, data: Dataset, shards: Shards) -> FederatedData:
    """The same with clients' own test samples set aside, all others to train on."""
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
    own, common = data.class_labels(), data.class_labels("test")
    if own is None or common is None:
        raise ConfigError(
            "evaluation.local_test=true: needs a test set with class labels, which this data set has not; "
            "give evaluation.holdout=0.2 instead"
        )
    counts = shards.counts(own.numpy(), data.num_classes)
    return local_tests(counts, common.numpy(), lambda i: numpy_rng(seed, "local test", 0, i))


def classes_to_count(config: DictConfig, data: Dataset) -> int:
    """The number of classes if they are to be measured one by one, else 0."""
    if not config.evaluation.by_class:
        return 0
    if data.class_labels() is None:
        raise ConfigError("evaluation.by_class=true: this data set has no class labels; leave it false")
    return data.num_classes


def example(data: FederatedData, dtype: torch.dtype) -> Batch:
    """Two training samples as the model gets them, for whoever needs shapes."""
    train, rows = data.dataset.train, torch.arange(len(data.dataset.train))
    if data.roles.truth is not None or data.roles.dealt is not None:  # of those that training may see
        rows = torch.from_numpy(data.shards.index[:2])
        if not len(rows) and (own := data.roles.server) is not None:
            return own.read(data.dataset, dtype).read(torch.arange(min(2, len(own.rows))))
    return LocalData(train, rows, dtype, data.dataset.normalize).read(torch.arange(min(2, len(rows))))
