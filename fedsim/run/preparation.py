"""What a run works on, in a simulation or at a client's node: settings, data, task and the workers' plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig

from fedsim.config.check import validate
from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig, EmbedConfig, FailureConfig
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.embedding import embedded
from fedsim.data.federated import FederatedData
from fedsim.data.finite import blurred
from fedsim.data.local import Batch
from fedsim.data.views import configured
from fedsim.engine.assignments import Plan
from fedsim.engine.base import pick_device
from fedsim.errors import ConfigError
from fedsim.local.groups import check_groups
from fedsim.local.rates import prepared
from fedsim.models.split import with_forward
from fedsim.run import (
    assigning,
    canaries,
    initial,
    participants,
    pixels,
    releasing,
    samples,
    tasks,
    trial,
    unseen,
)
from fedsim.run.augmented import check_augment
from fedsim.run.given import Given
from fedsim.run.repeated import check_views
from fedsim.run.resolve import resolve
from fedsim.sampling.cohort import check_cohorts
from fedsim.server.collusion import Planting
from fedsim.server.traits import StrategyLike
from fedsim.system.clock import Clock
from fedsim.task.admission import refuse_nonfinite
from fedsim.task.habits import Habits
from fedsim.task.losses import own_loss
from fedsim.task.rehearsal import rehearsed
from fedsim.task.task import Task

log = logging.getLogger(__name__)

LOOKED_AT = 1000  # samples by which it is told whether a column is one value in float32


def settle(config: DictConfig, given: Given) -> None:
    """Settings that follow from what was handed over; then every setting is checked."""
    if given.test is not None and given.clients is None and given.data is None:
        raise ConfigError("test: give it together with clients or data")
    if given.data is not None and given.clients is not None:
        raise ConfigError("data: give either data, to be split, or clients")
    if given.clients is not None:
        if not len(given.clients):
            raise ConfigError("clients: the list is empty; give one (x, y) pair per client")
        config.num_clients = len(given.clients)
    if given.cohorts is not None:
        config.clients_per_round = min(config.clients_per_round, config.num_clients)
        check_cohorts(given.cohorts, config.rounds, config.num_clients, assigning.absent(config)[0])
    if isinstance(given.test, Mapping) and given.domains is None:
        raise ConfigError("test: a pair per domain needs domains=[...], the name of each client's domain")
    validate(config)
    assigning.check(config, given.validation, owned=given.clients is not None)
    canaries.check(config)
    given.record(config)
    resolve(config)


def unmeasured(config: DictConfig, data: FederatedData) -> str:
    """What to say of a run that measures nothing; empty if it measures something."""
    plan, roles = config.evaluation, data.roles
    own = plan.clients_every and (plan.holdout or plan.local_test or plan.clients_on == "domain")
    if data.dataset.test is not None and len(data.dataset.test):
        return ""
    if own or plan.client_validation or roles.validation is not None or roles.newcomers is not None:
        return ""
    return (
        "nothing is measured: there is no test set; hand over test=(x, y), or type evaluation.holdout=0.2 "
        "evaluation.clients_every=1 to measure on a part of each client's samples"
    )


def load_data(config: DictConfig, given: Given, method: StrategyLike) -> FederatedData:
    """Clients as handed over, or the configured source, split; all in one place if that is what the method is for."""
    if given.clients is not None:
        data = samples.given_clients(
            config, given.clients, given.test, given.domains, given.classes, given.model, given.augment
        )
    elif given.data is not None:
        data = samples.split(config, samples.as_taken(config, given.data, given.model))
    else:
        learned = tasks.problem(config, given)
        found = samples.dataset(config, given.model, own_loss=learned.raw, kind=learned.targets)
        if given.augment is not None:
            found = replace(found, augment=given.augment)
        data = samples.split(config, found)
    data = canaries.planted(config, assigning.external(config, data, given))
    if config.encoder:
        device = pick_device(config.engine.device)
        made = embedded(data.dataset, config.encoder, as_dataclass(config.embed, EmbedConfig), device)
        data = assigning.encoded(config, replace(data, dataset=made), device)
    attack, _ = participants.attack(config)
    if isinstance(attack, Planting):
        data = replace(data, roles=replace(data.roles, triggered=attack.triggered(data)))
    return data.pooled() if method.traits.pooled else data


def learning_task(
    config: DictConfig,
    given: Given,
    data: FederatedData,
    method: StrategyLike | None = None,
    rehearse: Callable[[Task, Batch, torch.dtype], Habits] = rehearsed,
) -> Task:
    """The initial model, configured or handed over, as ``method`` trains it, and its loss; ``rehearse`` finds out what
    the model does beside computing."""
    model = initial.model(config, data.dataset, given.model)
    if given.initial is not None:
        model = initial.initialised(model, given.initial, initial.DTYPES[config.dtype])
    refuse_nonfinite(model)
    if method is not None:
        model = initial.fitted(model, method.traits)
    by_class = samples.classes_to_count(config, data.dataset)
    problem, dtype = tasks.problem(config, given), initial.DTYPES[config.dtype]
    if problem.forward is not None and method is not None and method.traits.features:
        model = with_forward(model, problem.forward)
    if config.client.accumulate > 1 and not data.dataset.train.sliceable:
        raise ConfigError(
            f"client.accumulate={config.client.accumulate}: batches of a collate function cannot be cut; leave it at "
            "1 and type the client.batch_size that fits"
        )
    check_groups(config.client.groups, [n for n, p in model.named_parameters() if p.requires_grad])
    example = samples.example(data, dtype)
    whole = data.dataset.num_classes or (0 if isinstance(data.dataset.train, Samples) else None)
    confusion = 0 if unseen.kinds(config, data) is None else data.dataset.num_classes
    known = {"by_class": by_class, "confusion": confusion, "num_classes": whole, "example": example.x}
    if not example.size:
        return tasks.task_of(problem, model, **known)
    output = trial.check(data, model, problem, example, dtype)
    task = tasks.task_of(problem, model, output, **known)
    if problem.loss is None and task.loss is not own_loss:
        trial.check_labels(data, output, type(model).__name__, example)
    trial.check_measures(task, example, dtype)
    if problem.pixels is not None:
        pixels.check_pixels(data, *problem.pixels)
    if (augment := data.dataset.augment) is not None:
        key = "augment" if given.augment is not None else "data.augment"
        check_augment(augment, data.dataset, key, task, dtype)
    check_views(data.dataset, configured(config.views), task, dtype)
    if dtype != torch.float64:
        _say_blurred(data.dataset)
    return replace(task, habits=rehearse(task, example, dtype))


def _say_blurred(data: Dataset) -> None:
    """Name a column whose values are nearly one to a model in float32; a look at the first samples."""
    if not isinstance(data.train, Samples) or not len(data.train):
        return
    x = data.train.take(torch.arange(min(LOOKED_AT, len(data.train))))[0]
    if (at := blurred(x)) is None:
        return
    column = x[:, at]
    log.warning(
        "data: values of column %s lie around %.4g with a deviation of %.2g, less than float32 tells apart there: they "
        "are nearly one value to the model; subtract a constant, or type dtype=float64",
        repr(data.columns[at]) if data.columns else at,
        float(column.mean()),
        float(column.std(correction=0)),
    )


def plan(
    config: DictConfig,
    method: StrategyLike,
    task: Task,
    data: FederatedData,
    clock: Clock | None,
    others: Sequence[Task] = (),
    efforts: Sequence[float] = (),
) -> Plan:
    """All that a worker must know, in a simulation or at a client's node; ``others`` and ``efforts`` are of the models
    that some clients train instead (``fedsim.run.architectures``)."""
    local = prepared(as_dataclass(config.client, ClientConfig), config.rounds)
    attack, attackers = participants.attack(config)
    if attack and attackers and len(data.dataset.train):
        attack = attack.fitted(data.present)
    return Plan(
        task=task,
        client=attack.wrap(method.client, frozenset(attackers)) if attack and attackers else method.client,
        data=data.handed(),
        local=local,
        failures=as_dataclass(config.failures, FailureConfig),
        seed=config.seed,
        dtype=initial.DTYPES[config.dtype],
        buffers=method.traits.buffers or config.buffers,
        threads=config.engine.threads,
        device=pick_device(config.engine.device),
        vectorize=config.engine.vectorize,
        lanes=config.engine.lanes,
        tf32=config.engine.tf32,
        kinds=participants.client_kinds(config, local, method, data.num_clients, clock),
        views=configured(config.views),
        hashes=config.tracker.update_hashes,
        release=releasing.release(config, method, local, data),
        others=tuple(others),
        efforts=tuple(efforts),
    )
