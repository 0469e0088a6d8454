"""Whether a method can work with a run's settings, data and model, by its traits, before anything starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedsim.config.parts import as_dataclass, part
from fedsim.config.schema import ClientConfig
from fedsim.data.federated import FederatedData
from fedsim.data.labelled import Labelled
from fedsim.errors import ConfigError
from fedsim.local.groups import check_values
from fedsim.local.interface import ClientLike
from fedsim.local.kinds import Kinds
from fedsim.local.rates import prepared
from fedsim.models.directions import CosineHead
from fedsim.models.split import head_of
from fedsim.run.assigning import absent
from fedsim.run.given import Given
from fedsim.run.misspelt import misspelt
from fedsim.sampling.rules import Sampler
from fedsim.server.traits import ChecksCohort, StrategyLike, Traits, aggregator_of, missing
from fedsim.task.heads import HeadSlots, check_body, check_features, check_logits, check_named_head
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.unseeded import clock, unseeded

if TYPE_CHECKING:
    from fedsim.topology import Topology

log = logging.getLogger(__name__)
UNSEEDED = (
    "gives something else in every process: if training depends on it, the run does not repeat. Draw from job.rng(), "
    "or from torch's, NumPy's or Python's own generator, which are seeded for each client"
)
CLOCK = (
    "asks a clock: if training depends on it, the run does not repeat. client.steps and client.epochs say how long "
    "clients train"
)

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
    if isinstance(method, str):
        raise ConfigError(
            f"strategy={method!r}: an object is handed over; by its name it is a setting: "
            f'simulate(["strategy={method}"])'
        )
    refuse_partial(method, StrategyLike, "strategy", "strategies.base.Strategy")
    refuse_partial(method.client, ClientLike, "strategy: its client", "clients.base.Client")
    name = type(method).__name__
    if not isinstance(method.traits, Traits):
        raise ConfigError(
            f"strategy: {name}.traits is of type {type(method.traits).__name__}; "
            "type traits = Traits(...), from fedsim.server.traits"
        )
    for thing in (method, method.client):
        if found := misspelt(thing):
            log.warning("strategy: %s.%s() is called by nobody; is it %s()?", type(thing).__name__, *found)
    for asked, advice in ((unseeded, UNSEEDED), (clock, CLOCK)):
        if call := asked([type(method), type(method.client)]):
            log.warning("%s %s", call, advice)
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
    most = config.num_clients - len(absent(config)[0])
    if isinstance(method, ChecksCohort):
        method.check_cohort(min(size, most), most)


def check_classes(method: StrategyLike, data: FederatedData) -> None:
    """Refuse data without class labels under a method that needs them.

    Raises:
        ConfigError: naming the method, and what to type.
    """
    if method.traits.labels and data.dataset.class_labels() is None:
        raise ConfigError(
            f"data: {type(method).__name__} needs class labels, one a sample, which this data set has not; "
            "give whole numbers from 0, or type strategy=fedavg"
        )


def check_labelled(method: StrategyLike, config: DictConfig, given: Given) -> None:
    """Refuse data whose labels are not where the method needs them.

    Raises:
        ConfigError: naming the setting, and what to type.
    """
    labelled, traits = Labelled.of(config.data.get("labelled")), method.traits
    name = config.method or type(method).__name__.lower()
    at, own = None if labelled is None else labelled.at, given.server is not None or config.data.get("server")
    if labelled is not None and at == "client" and not labelled.draws:
        raise ConfigError(
            "data.labelled.at=client: how many? Add data.labelled.share=0.1, or data.labelled.count=50"
        )
    if at == "server" and labelled is not None and labelled.draws == bool(own):
        raise ConfigError(
            "data.labelled.at=server: the server has samples of its own already; leave share and count out"
            if own
            else "data.labelled.at=server: how many? Add data.labelled.share=0.1, or data.labelled.count=60"
        )
    if traits.labelled == "server" and at != "server":
        raise ConfigError(f"{name} needs data.labelled.at=server")
    if traits.labelled == "client" and at == "server":
        raise ConfigError(
            f"{name} trains on clients' labelled samples, but they have none; type data.labelled.at=client"
        )
    if traits.unlabelled and at is None:
        raise ConfigError(
            f"{name} needs samples without labels; type data.labelled.at=client data.labelled.share=0.1"
        )


def other_rule(method: StrategyLike) -> str:
    """What a method uses in the mean's place, in words; empty if it is the mean, or if it has no aggregator."""
    rule: Any = aggregator_of(method)
    before: Any = ()
    while isinstance(rule, partial):
        rule, before = rule.func, before or rule.keywords.get("before", ())
    name = getattr(rule, "__name__", type(rule).__name__)
    if rule is None or (name == "mean" and not before):
        return ""
    return f"{name} after aggregator.before" if before else name


def check_parts(method: StrategyLike, config: DictConfig, topology: Topology | None) -> None:
    """Refuse an aggregator, sampling rule, graph, attack or kinds of clients that do not go with the method.

    Raises:
        ConfigError: naming the setting, and what to type.
    """
    traits, devices = method.traits, bool(config.system)
    if traits.mean_only and other_rule(method):
        raise ConfigError(f"aggregator: {traits.mean_only}")
    if topology is not None and traits.undirected and topology.directed:
        raise ConfigError(traits.undirected)
    if topology is not None and traits.fixed_graph and not topology.fixed:
        raise ConfigError(traits.fixed_graph)
    sampler = part(config.sampling, "sampling")
    if isinstance(sampler, Sampler):
        sampler.refuse(devices=devices, asynchronous=traits.asynchronous)
    if traits.pooled:
        for key in ("attack", "client.classes"):
            if OmegaConf.select(config, key) is not None:
                raise ConfigError(
                    f"{key}: {type(method).__name__} has all samples in one place, so no client is different; "
                    f"leave {key} out"
                )
    local = prepared(as_dataclass(config.client, ClientConfig), config.rounds)
    check_values(local.groups)
    if local.classes is not None:
        speed = np.ones(config.num_clients) if devices else None
        check_models(Kinds.of(local, config.num_clients, config.seed, speed), method, config)


def check_models(kinds: Kinds, method: StrategyLike, config: DictConfig) -> None:
    """Refuse widths and architectures of clients' models that the method does not know, or that what else is done with
    vectors does not fit."""
    if set(kinds.widths) != {1.0} and not method.traits.widths:
        raise ConfigError(
            "client.classes: a width needs a method that trains parts of the model; strategy=heterofl"
        )
    if not any(kinds.architectures):
        return
    if not method.traits.architectures:
        raise ConfigError(
            f"client.classes: {type(method).__name__} puts vectors of one model together, so no class can have another "
            "`model`; leave it out, or type strategy=co_boosting, dense, feddf, fens or one_shot"
        )
    for key in ("attack", "privacy", "compression", "secagg", "pretrain"):
        if OmegaConf.select(config, key):
            raise ConfigError(
                f"{key}: it is for one model of all clients, but classes of client.classes have a `model` of their "
                f"own; leave {key} out"
            )


def check_task(method: StrategyLike, task: Task, data: FederatedData, buffers: str = "average") -> None:
    """Refuse a model or data that the method, or the run's policy for ``buffers``, cannot work with.

    Raises:
        ConfigError: naming what is missing, and what to type.
    """
    traits, name = method.traits, type(method).__name__
    if traits.features:
        check_features(task, name)
        check_named_head(task)
    if traits.logits:
        check_logits(task, name)
    if traits.vectors and not isinstance(task.example, Tensor | None):
        raise ConfigError(
            f"data: {name} computes with samples that are one tensor, an embedding or an image; choose an encoder that "
            "makes one (encoder=...), or another method"
        )
    if traits.body:
        check_body(task, name)
    if traits.linear_head:
        HeadSlots.of(Layout(task.model))
        if isinstance(head_of(task.model), CosineHead):
            raise ConfigError(
                f"model: {name} needs a linear head, this one compares directions; type model=mlp"
            )
    layout = Layout(task.model)
    if not layout.batch_norm and not layout.buffer_dim:
        kind = type(task.model).__name__
        if traits.batch_norm:
            log.warning(
                "strategy: %s keeps BatchNorm with its clients, but %s has no such layer, so it is FedAvg; type "
                "strategy=fedavg, or a model with BatchNorm (model.norm=batch, model.batch_norm=true)",
                name,
                kind,
            )
        if traits.buffers is None and buffers != "average":
            log.warning(
                "buffers=%s: without effect; %s has no BatchNorm; leave buffers out, or type a model with it "
                "(model.norm=batch, model.batch_norm=true)",
                buffers,
                kind,
            )
    if traits.widths and layout.buffer_dim:
        raise ConfigError(
            f"model: {name} trains parts of it, but running statistics have no width; use GroupNorm (model.norm=group)"
        )
