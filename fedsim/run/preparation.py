"""What a run works on, in a simulation or at a client's node: settings, data, task and the workers' plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig

from fedsim.config.check import validate
from fedsim.config.parts import typed
from fedsim.config.schema import ClientConfig, EmbedConfig, FailureConfig
from fedsim.data.embedding import embedded
from fedsim.data.federated import FederatedData
from fedsim.engine.assignments import Plan
from fedsim.engine.base import pick_device
from fedsim.errors import ConfigError
from fedsim.local.groups import check_groups
from fedsim.local.rates import prepared
from fedsim.run import initial, participants, samples, trial
from fedsim.run.given import Given
from fedsim.run.resolve import resolve
from fedsim.sampling.cohort import check_cohorts
from fedsim.server.traits import StrategyLike
from fedsim.system.clock import Clock
from fedsim.task.habits import UNKNOWN
from fedsim.task.rehearsal import rehearsed
from fedsim.task.task import Task, cross_entropy


def settle(config: DictConfig, given: Given) -> None:
    """Settings that follow from what was handed over; then every setting is checked."""
    if given.test is not None and given.clients is None:
        raise ConfigError("test: give it together with clients")
    if given.clients is not None:
        if not len(given.clients):
            raise ConfigError("clients: the list is empty; give one (x, y) pair per client")
        config.num_clients = len(given.clients)
    if given.cohorts is not None:
        config.clients_per_round = min(config.clients_per_round, config.num_clients)
        check_cohorts(given.cohorts, config.rounds, config.num_clients)
    if given.domains is not None and len(given.domains) != len(given.clients or ()):
        raise ConfigError(
            f"domains: {len(given.domains)} names for {len(given.clients or ())} clients; give one per client"
        )
    if isinstance(given.test, Mapping) and given.domains is None:
        raise ConfigError("test: a pair per domain needs domains=[...], the name of each client's domain")
    validate(config)
    given.record(config)
    resolve(config)


def load_data(config: DictConfig, given: Given, method: StrategyLike) -> FederatedData:
    """Clients as handed over, or the configured source, split; all in one place if that is what the method is for."""
    if given.clients is not None:
        data = samples.given_clients(
            config, given.clients, given.test, given.domains, given.classes, given.model
        )
    else:
        own_loss = given.loss is not None
        data = samples.split(config, samples.dataset(config, given.model, own_loss=own_loss))
    if config.encoder:
        device = pick_device(config.engine.device)
        made = embedded(data.dataset, config.encoder, typed(config.embed, EmbedConfig), device)
        data = replace(data, dataset=made)
    return data.pooled() if method.traits.pooled else data


def learning_task(config: DictConfig, given: Given, data: FederatedData) -> Task:
    """The initial model, configured or handed over, and its loss."""
    model = initial.model(config, data.dataset, given.model)
    if given.initial is not None:
        model = initial.initialised(model, given.initial, initial.DTYPES[config.dtype])
    by_class = samples.classes_to_count(config, data.dataset)
    loss, dtype = given.loss or cross_entropy, initial.DTYPES[config.dtype]
    trial.check(data, model, loss, dtype)
    check_groups(config.client.groups, [n for n, p in model.named_parameters() if p.requires_grad])
    example = samples.example(data, dtype)
    classes = data.dataset.num_classes
    habits = rehearsed(model, loss, example.x, example.y, dtype) if len(example.x) else UNKNOWN
    return Task(model, loss, by_class=by_class, example=example.x, num_classes=classes, habits=habits)


def plan(
    config: DictConfig, method: StrategyLike, task: Task, data: FederatedData, clock: Clock | None
) -> Plan:
    """All that a worker must know, in a simulation or at a client's node."""
    local = prepared(typed(config.client, ClientConfig), config.rounds)
    attack, attackers = participants.attack(config)
    return Plan(
        task=task,
        client=attack.wrap(method.client, frozenset(attackers)) if attack and attackers else method.client,
        data=data,
        local=local,
        failures=typed(config.failures, FailureConfig),
        seed=config.seed,
        dtype=initial.DTYPES[config.dtype],
        buffers=method.traits.buffers or config.buffers,
        threads=config.engine.threads,
        device=pick_device(config.engine.device),
        vectorize=config.engine.vectorize,
        classes=participants.client_classes(config, local, method, data.num_clients, clock),
    )
