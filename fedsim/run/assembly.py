"""The engine and the loop of a run, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from torch import nn

from fedsim.config.parts import as_dataclass, part
from fedsim.config.schema import CheckpointConfig, EvaluationConfig, RayConfig
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Portion
from fedsim.engine import vectorised
from fedsim.engine.assignments import Plan
from fedsim.engine.base import Engine, SerialEngine
from fedsim.engine.cores import check_number
from fedsim.engine.workshop import Workshop
from fedsim.errors import ConfigError
from fedsim.local.kept import SERVER
from fedsim.run import architectures, assigning, initial, participants, releasing, unseen
from fedsim.run.given import Given
from fedsim.run.key import run_dir
from fedsim.run.preparation import plan
from fedsim.run.uploadstore import UploadStore
from fedsim.sampling import Population
from fedsim.sampling.cohort import check_cohorts
from fedsim.sampling.exclusion import Roster
from fedsim.server.bench import Bench
from fedsim.server.clientstore import ClientStore
from fedsim.server.collusion import colluding
from fedsim.server.context import Context
from fedsim.server.examiner import Examiner
from fedsim.server.exchanger import Exchanger
from fedsim.server.exchanges import Server
from fedsim.server.loop import Loop
from fedsim.server.traits import StrategyLike, aggregator_of
from fedsim.task import room
from fedsim.task.copies import copied
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel
from fedsim.tracking import Trackers

if TYPE_CHECKING:
    from fedsim.system.clock import Clock
    from fedsim.topology import Topology

VECTORISED_CHUNKS = 2  # large chunks, since a chunk's clients are computed at once
GPU_CROWD = 50  # clients of a chunk on a GPU


def start_engine(config: DictConfig) -> Engine:
    """The configured engine, without work yet."""
    check_number("engine.threads", config.engine.threads)
    if config.engine.name == "serial":
        return SerialEngine()
    if config.engine.name == "flower":
        raise ConfigError(
            "engine=flower: clients are computed at the nodes of a deployment; start it with `fedsim deploy local`, "
            "or with `flwr run` (docs/deployment.md)"
        )
    from fedsim.engine.ray.engine import RayEngine

    return RayEngine(as_dataclass(config.engine, RayConfig))


def assemble(
    config: DictConfig,
    given: Given,
    method: StrategyLike,
    task: Task,
    data: FederatedData,
    engine: Engine,
    trackers: Trackers,
    key: str,
    topology: Topology | None,
) -> Loop:
    """Give the engine its plan and put the loop together."""
    cohorts = _cohorts(config, given, method)
    folder, start = run_dir(config), FlatModel(copied(task.model), initial.DTYPES[config.dtype])
    large = start.w.nbytes > room.LARGE and (engine.remote or isinstance(engine, SerialEngine))
    if large:
        room.on_disk(start, folder)
    if engine.remote or (large and not isinstance(given.model, nn.Module) and config.dtype == "float32"):
        room.lend(
            start, task.model
        )  # which was built for the run: a module that was handed over is somebody's
    clock = participants.clock(config, task, data, start.layout.size)
    others = architectures.tasks(config, given, data)
    work = plan(config, method, task, data, clock, others, architectures.efforts(config, task, others, data))
    context = _context(config, given, work, data, start, topology)
    method.setup(task, start.layout)
    engine.start(work)
    return Loop(
        strategy=method,
        server=replace(
            _server(config, context, work, data, start, engine, clock, method, cohorts is not None),
            depot=None
            if method.traits.uploads is None
            else UploadStore(config, given, method, data, context),
        ),
        trackers=trackers,
        rounds=config.rounds,
        clients_per_round=data.num_clients
        if method.traits.everybody
        else min(config.clients_per_round, data.num_clients),
        evaluation=as_dataclass(config.evaluation, EvaluationConfig),
        checkpoints=as_dataclass(config.checkpoint, CheckpointConfig),
        folder=folder,
        key=key,
        cohorts=cohorts,
    )


def _context(
    config: DictConfig,
    given: Given,
    work: Plan,
    whole: FederatedData,
    start: FlatModel,
    topology: Topology | None,
) -> Context:
    """What a strategy may know of the run; ``whole`` holds also what is not ``handed`` to workers."""
    data, own = work.data, whole.roles
    return Context(
        task=work.task,
        layout=start.layout,
        start=start.weights,
        sizes=data.shards.sizes,
        local=work.local,
        seed=config.seed,
        dtype=work.dtype,
        share_buffers=work.buffers in ("average", SERVER),
        own_buffers=work.buffers == SERVER,
        class_counts=data.all_counts(),
        unlabelled=None if own.unlabelled is None else own.unlabelled.sizes,
        data=None if own.server is None else own.server.read(whole.dataset, work.dtype),
        roster=Roster(data.num_clients, own.absent) if own.absent else None,
        newcomers=None if own.newcomers is None else own.newcomers.sizes,
        own_tests=data.local_test,
        client_domains=data.domain_names,
        topology=topology,
        fresh=None if given.initial is not None else initial.fresh(config, data.dataset, given.model),
        kinds=work.kinds,
        others=architectures.with_layouts(config, work.others),
    )


def _server(
    config: DictConfig,
    context: Context,
    work: Plan,
    data: FederatedData,
    start: FlatModel,
    engine: Engine,
    clock: Clock | None,
    method: StrategyLike,
    cohorts: bool,
) -> Server:
    """The server of ``method``, with an exchanger and an examiner on the started engine; ``cohorts``: they were handed
    over."""
    test, folder = data.dataset.test, run_dir(config)
    few = VECTORISED_CHUNKS if vectorised.planned(work, start) and work.device == "cpu" else 0
    exchanger = Exchanger(
        context=context,
        engine=engine,
        states=ClientStore(folder / "checkpoint", config.checkpoint.memory_mb << 20),
        failures=work.failures,
        chunks=data.num_clients if method.traits.client_by_client else config.engine.chunks or few,
        crowd=0 if work.device == "cpu" else GPU_CROWD,
        collusion=colluding(*participants.attack(config), folder, aggregator_of(method)),
        landing=releasing.landing(config, work, context, method, folder, cohorts),
    )
    examiner = Examiner(
        context=context,
        engine=engine,
        test_size=0 if test is None else len(test),
        test_labels=None if test is None or test.labels is None else test.labels[data.test_rows],
        test_domains=data.test_domains,
        eval_batch=config.evaluation.batch_size,
        truth=data.truth_of if data.roles.truth is not None else None,
        kinds=unseen.kinds(config, data),
    )
    fill = method.traits.asynchronous or config.exclude_fill == "substitute"
    people = Population(data.registered, config.seed, clock, config.participation)
    people.absent, people.fill = data.roles.absent, fill
    if work.release is not None and (privacy := work.release.privacy) is not None:
        people.empty, people.cap, people.secret = privacy.central, privacy.cap, privacy.noise == "os"
    return Server.of(
        context,
        exchanger=exchanger,
        examiner=examiner,
        validator=_elsewhere(examiner, data, data.roles.validation, "val", data.roles.validation_domains),
        triggered=_elsewhere(examiner, data, data.roles.triggered, "attack", {}),
        bench=None if data.roles.server is None else Bench(work, data),
        workshop=Workshop(work, data.dataset),
        population=people,
        sampler=part(config.sampling, "sampling"),
        clock=clock,
    )


def _elsewhere(
    examiner: Examiner, data: FederatedData, part: Portion | None, on: str, domains: Mapping[str, slice]
) -> Examiner | None:
    """The examiner of another ``part`` of the samples than the test set, if there is one."""
    if part is None:
        return None
    labels = (part.samples or data.dataset.train).labels
    return replace(
        examiner,
        test_size=len(part.rows),
        test_labels=None if labels is None else labels[part.rows],
        test_domains=domains,
        on=on,
    )


def _cohorts(config: DictConfig, given: Given, method: StrategyLike) -> list[list[int]] | None:
    """The cohorts handed over, if there are any and the method takes cohorts."""
    if given.cohorts is None:
        return None
    if method.traits.asynchronous:
        raise ConfigError("cohorts: an asynchronous method starts clients by itself; leave cohorts out")
    return check_cohorts(given.cohorts, config.rounds, config.num_clients, assigning.absent(config)[0])
