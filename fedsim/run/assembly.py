"""The engine and the loop of a run, put together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.config.compose import plain
from fedsim.config.parts import part, typed
from fedsim.config.schema import CheckpointConfig, EvaluationConfig, RayConfig
from fedsim.data.federated import FederatedData
from fedsim.engine import vectorised
from fedsim.engine.base import Engine, SerialEngine
from fedsim.errors import ConfigError
from fedsim.run import initial, participants
from fedsim.run.given import Given
from fedsim.run.key import method_name, run_dir, run_name
from fedsim.run.preparation import plan
from fedsim.sampling.cohort import check_cohorts
from fedsim.server.clientstore import ClientStore
from fedsim.server.collusion import conspiracy
from fedsim.server.exchanges import Server
from fedsim.server.loop import Loop
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel
from fedsim.tracking import RunInfo, Trackers

VECTORISED_CHUNKS = 2  # large chunks, since a chunk's clients are computed at once


def start_engine(config: DictConfig) -> Engine:
    """The configured engine, without work yet."""
    if config.engine.name == "serial":
        return SerialEngine()
    if config.engine.name == "flower":
        raise ConfigError(
            "engine=flower: clients are computed at the nodes of a deployment; start it with `fedsim deploy local`, "
            "or with `flwr run` (docs/deployment.md)"
        )
    from fedsim.engine.ray.engine import RayEngine

    return RayEngine(typed(config.engine, RayConfig))


def assemble(
    config: DictConfig,
    given: Given,
    method: Any,
    task: Task,
    data: FederatedData,
    engine: Engine,
    trackers: Trackers,
    key: str,
) -> Loop:
    """Give the engine its plan and put the loop together."""
    cohorts = _cohorts(config, given, method)
    folder, start = run_dir(config), FlatModel(copy.deepcopy(task.model), initial.DTYPES[config.dtype])
    clock, topology = participants.clock(config, task, data, start.layout.dim), participants.topology(config)
    work = plan(config, method, task, data, clock)
    if hasattr(method, "setup"):
        method.setup(task, start.layout)
    together = vectorised.planned(work, start)
    engine.start(work)
    checkpoints = typed(config.checkpoint, CheckpointConfig)
    server = Server(
        engine=engine,
        task=task,
        layout=start.layout,
        start=start.weights,
        sizes=data.shards.sizes,
        local=work.local,
        failures=work.failures,
        states=ClientStore(folder / "checkpoint", checkpoints.memory_mb << 20),
        seed=config.seed,
        dtype=work.dtype,
        chunks=config.engine.chunks or (VECTORISED_CHUNKS if together else 0),
        share_buffers=work.buffers == "average",
        test_labels=None if data.dataset.test is None else data.dataset.test.y[data.test_rows],
        own_tests=data.local_test,
        class_counts=data.all_counts(),
        test_domains=data.test_domains,
        client_domains=data.domain_names,
        eval_batch=config.evaluation.batch_size,
        topology=topology,
        fresh=None if given.initial is not None else initial.fresh(config, data.dataset, given.model),
        clock=clock,
        classes=work.classes,
        sampler=part(config.sampling, "sampling"),
        participation=config.participation,
        collusion=conspiracy(*participants.attack(config), folder),
    )
    return Loop(
        strategy=method,
        server=server,
        trackers=trackers,
        rounds=config.rounds,
        clients_per_round=min(config.clients_per_round, data.num_clients),
        evaluation=typed(config.evaluation, EvaluationConfig),
        checkpoints=checkpoints,
        folder=folder,
        key=key,
        cohorts=cohorts,
    )


def _cohorts(config: DictConfig, given: Given, method: Any) -> list[list[int]] | None:
    """The cohorts handed over, if there are any and the method can be told."""
    if given.cohorts is None:
        return None
    if getattr(method, "asynchronous", False):
        raise ConfigError("cohorts: an asynchronous method starts clients by itself; leave cohorts out")
    return check_cohorts(given.cohorts, config.rounds, config.num_clients)


def describe(config: DictConfig, folder: Path, start_round: int) -> RunInfo:
    """The run's facts for trackers."""
    return RunInfo(
        dir=folder,
        name=run_name(config),
        group=config.name,
        method=method_name(config),
        config=plain(config),
        rounds=config.rounds,
        start_round=start_round,
        tags=tuple(config.tags),
    )
