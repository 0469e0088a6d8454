"""The roles of a run's samples: what is set apart before they are dealt out, what of each client's, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from fedsim.config.parts import as_dataclass, part
from fedsim.config.schema import EmbedConfig
from fedsim.data import containers
from fedsim.data.arrays import Array
from fedsim.data.dataset import Dataset, Samples, SamplesLike
from fedsim.data.door import admit, admit_parts
from fedsim.data.embedding import embedded
from fedsim.data.federated import FederatedData
from fedsim.data.joining import together
from fedsim.data.labelled import Labelled
from fedsim.data.labels import TargetRules
from fedsim.data.sample_roles import (
    Portion,
    Roles,
    by_domain,
    class_labels,
    in_arrays,
    kept,
    left_out,
    validation_rows,
    withheld,
)
from fedsim.data.shards import Shards, holdout
from fedsim.errors import ConfigError, DataError
from fedsim.rng import numpy_rng
from fedsim.run import samples_left_out, tasks
from fedsim.run.disjoint import share_of_server, with_server_part
from fedsim.run.given import Given
from fedsim.sampling.exclusion import draw_held_out

NODES = ("labelled", "server", "contract")  # of the group `data`, that are no options of its source


def source(node: DictConfig) -> DictConfig:
    """The node of a data source alone."""
    return DictConfig(
        {k: v for k, v in node.items_ex(resolve=False) if k not in NODES}, parent=node._get_parent()
    )


def absent(config: DictConfig) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of the clients that are never asked, and of those among them that are held out to be measured."""
    gone = frozenset(map(int, config.exclude))
    held = draw_held_out(config.seed, config.num_clients, config.evaluation.held_out_clients) - gone
    return gone | held, held


def check(config: DictConfig, validation: object = None, *, owned: bool = False) -> None:
    """Refuse settings of roles that cannot go together, before data are read.

    Raises:
        ConfigError: naming the key, and what to type.
    """
    ids = list(config.exclude)
    for client in ids:
        if not 0 <= client < config.num_clients:
            most = config.num_clients - 1
            raise ConfigError(f"exclude={ids}: client {client} does not exist; ids go from 0 to {most}")
        if ids.count(client) > 1:
            raise ConfigError(f"exclude={ids}: client {client} is listed twice")
    gone, held = absent(config)
    samples_left_out.check(config, gone - held)
    if config.evaluation.held_out_clients and not held:
        raise ConfigError(
            f"exclude={ids}: those are all clients that evaluation.held_out_clients holds out; leave one of them in"
        )
    if len(gone) == config.num_clients:
        who = "exclude and evaluation.held_out_clients" if held else f"exclude={ids}"
        raise ConfigError(f"{who}: of {config.num_clients} clients nobody is left to train")
    if ids and owned and config.evaluation.validation:
        raise ConfigError(
            f"exclude={ids}: evaluation.validation draws from all clients' samples by class, so theirs would be used; "
            "type evaluation.client_validation=0.1, or hand over validation=(x, y)"
        )
    if validation is not None and config.evaluation.validation:
        raise ConfigError("evaluation.validation: a validation set was handed over; leave one of them out")


def refuse_owned(config: DictConfig) -> None:
    """Refuse what takes samples out of all clients' data, where nodes bring their own."""
    for key, said in (
        ("evaluation.validation", "evaluation.client_validation=0.1 sets a part of each client's apart"),
        ("data.labelled.at", "leave labels out of the nodes' data, or simulate it"),
        ("data.server", "simulate it"),
        ("audit.canaries", "simulate it"),
        ("exclude_samples", "leave those samples out of the nodes' data"),
    ):
        if OmegaConf.select(config, key):
            raise ConfigError(f"{key}: nodes bring data of their own (own-data=true); {said}")


def before(config: DictConfig, data: Dataset, own: Shards | None = None) -> tuple[np.ndarray | None, Roles]:
    """What is set apart from the training samples, and the rows (n,) that are left for clients; ``None``: all.

    ``own``: whose samples they are already. The server gets none of clients that are excluded.
    """
    rows, roles = np.arange(len(data.train), dtype=np.int64), Roles()
    if share := config.evaluation.validation:
        chosen = validation_rows(data, share)
        rows = np.setdiff1d(rows, chosen, assume_unique=True)
        ordered, spans = by_domain(data, chosen)
        roles = replace(roles, validation=Portion(torch.from_numpy(ordered)), validation_domains=spans)
    rows, roles = with_server_part(config, data, rows, roles)
    labelled = Labelled.of(config.data.get("labelled"))
    if labelled is not None and labelled.at == "server" and labelled.draws:
        gone, held = absent(config)
        present = rows if own is None else np.intersect1d(rows, left_out(own, gone - held).index)
        chosen = labelled.of_server(data, present, config.seed)
        rows = np.setdiff1d(rows, chosen, assume_unique=True)
        roles = replace(roles, server=Portion(torch.from_numpy(chosen)))
    return (None, roles) if len(rows) == len(data.train) else (rows, roles)


def assigned(
    config: DictConfig, data: FederatedData, dealt: Shards, roles: Roles, *, counted: bool = False
) -> FederatedData:
    """``data`` with every sample in its role.

    Args:
        config: of the run.
        data: with clients' own tests set aside.
        dealt: what the partition gave each client, those included.
        roles: of what was set apart before.
        counted: the clients' nodes have set validation samples apart themselves.
    """
    shards, dataset = data.shards, data.dataset
    gone, held = absent(config)
    if (share := config.evaluation.client_validation) and not counted:
        shards, own = holdout(shards, share, lambda i: numpy_rng(config.seed, "client_validation", 0, i))
        roles = replace(roles, client_validation=own)
    if held:
        roles = replace(roles, newcomers=kept(dealt, held))
    labelled, trained = Labelled.of(config.data.get("labelled")), shards
    if labelled is not None:
        if labelled.at == "client":
            shards, unknown = labelled.of_clients(dataset, shards, config.seed)
        else:
            shards, unknown = left_out(shards, range(len(shards))), shards
        used = (shards, data.holdout, roles.client_validation, roles.newcomers)
        read = [s.index for s in used if s is not None]
        read += [
            p.rows.numpy() for p in (roles.validation, roles.server) if p is not None and p.samples is None
        ]
        hidden = np.setdiff1d(unknown.index, np.concatenate(read))
        if labelled.withhold:
            roles = replace(roles, unlabelled=unknown, truth=in_arrays(dataset.train).y)
            dataset = replace(dataset, train=withheld(dataset.train, hidden))
        else:
            roles = replace(roles, unlabelled=unknown, labels_known=True)
    if labelled is not None or gone:
        roles = replace(roles, dealt=trained)
    found = replace(data, dataset=dataset, shards=shards, roles=roles)
    rows = samples_left_out.rows(config, dealt)
    if rows:
        found = found.lacking(rows)
    whole = {c for c, own in rows.items() if len(own) == len(dealt.part(c))}
    if (excluded := (gone - held) | whole) or rows:
        roles = samples_left_out.of_others(found.roles, dataset, dealt, excluded)
        unused = samples_left_out.unused(dataset, dealt, excluded, rows)
        found = replace(found, roles=replace(roles, unused=unused))
    return found.without(gone) if gone else found


def handed(given: Given) -> Given:
    """What was handed over for validation and the server as arrays, whatever holds them."""
    like = next(iter(given.clients or ()), None)
    if (train := getattr(given.data, "train", None)) is not None:
        like = getattr(train, "x", None), getattr(train, "y", None)
    parts = {"validation": given.validation, "server": given.server}
    own: Any = {k: containers.part(k, v, like) for k, v in parts.items() if v is not None}
    return replace(given, **own)


def external(config: DictConfig, data: FederatedData, given: Given) -> FederatedData:
    """``data`` with the validation and server samples that come from elsewhere: handed over, or ``data.server``."""
    roles, dataset = data.roles, data.dataset
    learned = tasks.problem(config, given)
    rules = TargetRules(learned.raw, known=dataset.classes, kind=learned.targets)
    if given.validation is not None:
        roles = replace(roles, validation=_handed_part(dataset, given.validation, rules))
    if given.server is not None:
        mine = _handed_part(dataset, given.server, rules)
        roles = replace(roles, server=replace(mine, augment=dataset.augment))
    elif config.data.get("server") is not None and not share_of_server(config):
        roles = replace(roles, server=_of_source(config, dataset, replace(rules, known=())))
    return data if roles is data.roles else replace(data, roles=roles)


def _handed_part(data: Dataset, given: containers.Part, rules: TargetRules) -> Portion:
    """Samples that were handed over, in the clients' types and with the clients' classes."""
    if class_labels(data) is not None and isinstance(given.y, Array):
        given = replace(given, y=_as_classes(data.classes, given.name, given.y))
    pairs, _ = admit_parts([given], rules)
    samples = together(pairs)
    fitting(data, samples, given.name)
    kinds = _dtype(samples), _dtype(data.train)
    if data.normalize is not None and kinds[0] != kinds[1]:
        raise ConfigError(
            f"{given.name}: its samples are {kinds[0]}, those of the data source {kinds[1]}, before they are "
            "normalised; hand over the same"
        )
    return Portion(torch.arange(len(samples)), _alike(samples, data.train), data.normalize)


def _dtype(samples: SamplesLike) -> torch.dtype | None:
    """Of the inputs, where they are one tensor in memory."""
    x = getattr(samples, "x", None)
    return x.dtype if isinstance(x, torch.Tensor) else None


def _alike(samples: SamplesLike, others: SamplesLike) -> SamplesLike:
    """``samples`` with inputs in the type of ``others``, as a model takes them."""
    wanted = _dtype(others)
    if not isinstance(samples, Samples) or wanted is None or _dtype(samples) in (None, wanted):
        return samples
    return Samples(samples.x.to(wanted), samples.y)


def _as_classes(classes: Sequence[str], whose: str, y: Any) -> torch.Tensor:
    """Labels (n,), by name or number, as the classes that the clients have.

    Raises:
        DataError: for a label that is none of theirs, naming the row.
    """
    values, where = np.unique(np.asarray(y).reshape(-1), return_inverse=True)
    ids = {name: at for at, name in enumerate(classes)}
    found = []
    for at, value in enumerate(values.tolist()):
        name = (
            value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(int(value))
        )
        if name not in ids and not (name.isdecimal() and int(name) < len(classes)):
            row = int(np.flatnonzero(where == at)[0])
            raise DataError(
                f"{whose}, row {row}: label {value!r} is none of the clients' classes, {_few(classes)}"
            )
        found.append(ids[name] if name in ids else int(name))
    return torch.tensor(found, dtype=torch.int64)[torch.from_numpy(where.reshape(-1))]


def _of_source(config: DictConfig, data: Dataset, rules: TargetRules) -> Portion:
    """All training samples of another data source, for the server."""
    if not isinstance(config.data.server, DictConfig):
        raise ConfigError(
            f"data.server={config.data.server}: expected a source with its options; type "
            f"+data@data.server={config.data.server}"
        )
    found = part(config.data.server, "data.server", seed=config.seed)
    if not isinstance(found, Dataset):
        raise ConfigError(f"data.server: gave {type(found).__name__}, expected a fedsim.data.dataset.Dataset")
    found = admit(found, replace(rules, outputs=lambda: data.num_classes or None))
    fitting(data, found.train, "data.server")
    if found.num_classes > data.num_classes or found.classes != data.classes[: found.num_classes]:
        raise ConfigError(
            f"data.server: its classes are {_few(found.classes)}, the clients' {_few(data.classes)}; give a source "
            "with the same classes"
        )
    plain = found.normalize is None and not config.encoder
    samples = _alike(found.train, data.train) if plain else found.train
    return Portion(torch.arange(len(samples)), samples, found.normalize, found.augment)


def fitting(data: Dataset, samples: SamplesLike, whose: str) -> None:
    """Refuse inputs of another shape than the clients'."""
    if (own := Dataset(samples).input_shape) != data.input_shape:
        raise ConfigError(
            f"{whose}: its samples have shape {own}, the clients' {data.input_shape}; they must be alike"
        )


def encoded(config: DictConfig, data: FederatedData, device: str) -> FederatedData:
    """``data`` with the samples from elsewhere embedded, as the training samples are."""

    def through(given: Portion | None) -> Portion | None:
        if given is None or given.samples is None:
            return given
        options = as_dataclass(config.embed, EmbedConfig)
        made = embedded(Dataset(given.samples, normalize=given.normalize), config.encoder, options, device)
        return Portion(given.rows, made.train)

    roles = data.roles
    return replace(
        data, roles=replace(roles, validation=through(roles.validation), server=through(roles.server))
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
