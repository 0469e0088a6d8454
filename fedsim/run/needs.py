"""Whether a method can work with a run's settings, data and model, by its traits, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig

from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.local.interface import ClientLike
from fedsim.server.traits import ChecksCohort, StrategyLike, Traits, missing
from fedsim.task.heads import HeadSlots, check_body, check_features
from fedsim.task.layout import Layout
from fedsim.task.task import Task

ONCE_ATTRIBUTES = (
    "asynchronous",
    "buffers",
    "peers",
    "pooled",
    "widths",
)  # of the class, before there were traits


def check_whole(method: Any) -> None:
    """Refuse an object that is not a strategy, or whose client is none, by what it lacks.

    Raises:
        ConfigError: naming the members, or the attribute that nobody reads.
    """
    refuse_partial(method, StrategyLike, "strategy", "strategies.base.Strategy")
    refuse_partial(method.client, ClientLike, "strategy: its client", "clients.base.Client")
    name = type(method).__name__
    if not isinstance(method.traits, Traits):
        raise ConfigError(
            f"strategy: {name}.traits is of type {type(method.traits).__name__}; "
            "type traits = Traits(...), from fedsim.server.traits"
        )
    options = {f.name for f in fields(method)} if is_dataclass(method) else set[str]()
    said = {k for kind in type(method).__mro__ for k in vars(kind)}
    for old in ONCE_ATTRIBUTES:
        if old in said - options:
            raise ConfigError(f"strategy: {name}.{old} is read by nobody; type traits = Traits({old}=...)")


def refuse_partial(thing: Any, protocol: type, key: str, base: str) -> None:
    """Refuse a part of a run that lacks members of ``protocol``."""
    lacks = missing(thing, protocol)
    if lacks:
        named = ", ".join(f"'{name}'" for name in lacks)
        raise ConfigError(f"{key}: {type(thing).__name__} has no {named}; derive it from {base}")


def check_settings(method: StrategyLike, config: DictConfig) -> None:
    """Refuse settings that the method cannot work with.

    Raises:
        ConfigError: naming the setting, and what to type.
    """
    traits, name = method.traits, type(method).__name__
    if bool(config.topology) != traits.peers:
        raise ConfigError(
            "topology: this method's peers need a graph; type topology=ring, random_regular or another"
            if traits.peers
            else f"topology: {name} talks through a server; leave topology out, or type strategy=gossip"
        )
    deployed = config.engine.name == "flower"  # on real devices: see fedsim.flower.options.deployable
    if traits.devices == "needed" and not config.system and not deployed:
        raise ConfigError(
            "strategy: an asynchronous method needs devices that take different times; add system=lognormal "
            "or another system"
        )
    if traits.devices == "refused" and config.system:
        raise ConfigError(
            "system: asynchronous peers have times of their own; leave system out and describe devices and links by "
            "the settings of the strategy, or type strategy=gossip"
        )
    if config.system and not traits.over_selection and config.system.get("over_selection", 1) != 1:
        waits = "an asynchronous server waits for nobody" if traits.asynchronous else f"{name} waits for all"
        raise ConfigError(f"system.over_selection: {waits}; leave it at 1")
    if traits.one_step and config.client.steps != 1:
        raise ConfigError(
            f"client.steps={config.client.steps}: clients of {name} send one gradient a round; add client.steps=1"
        )


def check_cohort(method: StrategyLike, config: DictConfig, cohorts: Sequence[Sequence[int]] | None) -> None:
    """Refuse an aggregator that a round's clients, if none fails, are never enough for; a draw counts by its mean.

    Raises:
        ConfigError: naming both settings, and what to type.
    """
    size = config.clients_per_round if cohorts is None else max(map(len, cohorts), default=0)
    if isinstance(method, ChecksCohort):
        method.check_cohort(min(size, config.num_clients), config.num_clients)


def check_task(method: StrategyLike, task: Task, data: FederatedData) -> None:
    """Refuse a model or data that the method cannot work with.

    Raises:
        ConfigError: naming what is missing, and what to type.
    """
    traits, name, train = method.traits, type(method).__name__, data.dataset.train
    if traits.labels and (not data.dataset.num_classes or train.y.dim() != 1):
        raise ConfigError(
            f"data: {name} needs class labels, one a sample, which this data set has not; "
            "give whole numbers from 0, or type strategy=fedavg"
        )
    if traits.features:
        check_features(task, name)
    if traits.body:
        check_body(task, name)
    if traits.linear_head:
        HeadSlots.of(Layout(task.model))
    if traits.widths and Layout(task.model).buffer_dim:
        raise ConfigError(
            f"model: {name} trains parts of it, but running statistics have no width; use GroupNorm (model.norm=group)"
        )
