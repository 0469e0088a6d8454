"""The steps of a run, in the order ``fedsim.api.run`` takes them: settle, enter, load, assemble, execute."""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from fedsim import build, checkpoint
from fedsim.attack import ATTACKERS, conspiracy
from fedsim.build import typed
from fedsim.clientstore import ClientStore
from fedsim.cohort import check_cohorts
from fedsim.config import (
    CheckpointConfig,
    ClientConfig,
    EmbedConfig,
    EvaluationConfig,
    FailureConfig,
    RayConfig,
)
from fedsim.data.federated import FederatedData
from fedsim.data.longtail import class_groups
from fedsim.embedding import embedded
from fedsim.engine.base import Engine, SerialEngine, pick_device
from fedsim.engine.worker import Plan, vectorises
from fedsim.errors import ConfigError
from fedsim.given import Given
from fedsim.loop import Loop
from fedsim.server import Server
from fedsim.settings import method_name, plain, run_dir, run_name
from fedsim.system.clock import Clock
from fedsim.task import Task, cross_entropy
from fedsim.tracking import RunInfo, Trackers
from fedsim.validation import validate
from fedsim.vectors import FlatModel

VECTORISED_CHUNKS = 2  # large chunks, since a chunk's clients are computed at once


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other processes from writing to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another process is writing this run; wait for it, or give dir=..."
            ) from None
        yield


def enter(folder: Path, config: DictConfig, key: str) -> Path | None:
    """Prepare the run folder; the checkpoint to continue from, if there is one."""
    if config.resume == "never" and folder.exists():
        for name in ("checkpoint", "wandb", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (
            "metrics.jsonl",
            "clients.jsonl",
            "summary.json",
            "weights.safetensors",
            "config.yaml",
            ATTACKERS,
        ):
            (folder / name).unlink(missing_ok=True)
    previous = checkpoint.latest(folder / "checkpoint")
    if previous is not None:
        checkpoint.load(previous, key)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    return previous


def finished_summary(folder: Path, config: DictConfig) -> dict[str, Any] | None:
    """The summary of a finished run, or ``None``."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    done = summary.get("status") == "done" and (folder / "weights.safetensors").exists()
    return summary if done else None


def load_data(config: DictConfig, given: Given, method: Any) -> FederatedData:
    """Clients as handed over, or the configured source, split; all in one place if that is what the method is for."""
    if given.clients is not None:
        data = build.given_clients(config, given.clients, given.test, given.domains)
    else:
        data = build.split(config, build.dataset(config))
    if config.encoder:
        device = pick_device(config.engine.device)
        made = embedded(data.dataset, config.encoder, typed(config.embed, EmbedConfig), device)
        data = replace(data, dataset=made)
    return data.pooled() if getattr(method, "pooled", False) else data


def start_engine(config: DictConfig) -> Engine:
    """The configured engine, without work yet."""
    if config.engine.name == "serial":
        return SerialEngine()
    if config.engine.name == "flower":
        raise ConfigError(
            "engine=flower: clients are computed at the nodes of a deployment; start it with `fedsim deploy local`, "
            "or with `flwr run` (docs/deployment.md)"
        )
    from fedsim.engine.ray import RayEngine

    return RayEngine(typed(config.engine, RayConfig))


def learning_task(config: DictConfig, given: Given, data: FederatedData) -> Task:
    """The initial model, configured or handed over, and its loss."""
    model = build.model(config, data.dataset, given.model)
    if given.initial is not None:
        model = build.initialised(model, given.initial, build.DTYPES[config.dtype])
    by_class = build.classes_to_count(config, data.dataset)
    example = build.example(data, build.DTYPES[config.dtype])
    return Task(model, given.loss or cross_entropy, by_class=by_class, example=example.x)


def plan(config: DictConfig, method: Any, task: Task, data: FederatedData, clock: Clock | None) -> Plan:
    """All that a worker must know, in a simulation or at a client's node."""
    local = typed(config.client, ClientConfig)
    attack, attackers = build.attack(config)
    return Plan(
        task=task,
        client=attack.wear(method.client, frozenset(attackers)) if attack and attackers else method.client,
        data=data,
        local=local,
        failures=typed(config.failures, FailureConfig),
        seed=config.seed,
        dtype=build.DTYPES[config.dtype],
        buffers=getattr(method, "buffers", None) or config.buffers,
        threads=config.engine.threads,
        device=pick_device(config.engine.device),
        vectorize=config.engine.vectorize,
        classes=build.classes(config, local, method, data.num_clients, clock),
    )


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
    if given.cohorts is not None and getattr(method, "asynchronous", False):
        raise ConfigError("cohorts: an asynchronous method starts clients by itself; leave cohorts out")
    folder, start = run_dir(config), FlatModel(copy.deepcopy(task.model), build.DTYPES[config.dtype])
    clock = build.clock(config, task, data, start.layout.dim)
    work = plan(config, method, task, data, clock)
    if hasattr(method, "setup"):
        method.setup(task, start.layout)
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
        chunks=config.engine.chunks or (VECTORISED_CHUNKS if vectorises(work.vectorize, work.device) else 0),
        share_buffers=work.buffers == "average",
        test_labels=None if data.dataset.test is None else data.dataset.test.y[data.test_rows],
        own_tests=data.local_test,
        class_counts=data.all_counts(),
        test_domains=data.test_domains,
        client_domains=data.domain_names,
        eval_batch=config.evaluation.batch_size,
        clock=clock,
        classes=work.classes,
        sampler=build.part(config.sampling, "sampling"),
        participation=config.participation,
        collusion=conspiracy(*build.attack(config), folder),
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
        cohorts=None
        if given.cohorts is None
        else check_cohorts(given.cohorts, config.rounds, config.num_clients),
    )


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


def execute(loop: Loop, config: DictConfig, task: Task, data: FederatedData) -> dict[str, Tensor]:
    """Run the rounds, then write ``weights.safetensors`` and the pictures; returns the final state dict."""
    loop.run()
    model = FlatModel(copy.deepcopy(task.model), loop.server.dtype)
    weights = model.state_dict(loop.models()["global"])
    save_file({k: v.contiguous() for k, v in weights.items()}, loop.folder / "weights.safetensors")
    if config.tracker.plots:
        _draw(loop, data)
    return weights


def _draw(loop: Loop, data: FederatedData) -> None:
    """Curves, and the partition as a heat map. A picture that fails costs a warning, not the run."""
    from fedsim.data.picture import draw_partition
    from fedsim.report import figure_of

    try:
        figure_of({"run": [loop.history]}).savefig(loop.folder / "curves.png", dpi=150)
        y = data.dataset.train.y
        if len(y) and data.dataset.num_classes and y.dim() == 1:
            held = data.all_counts() if loop.server.task.by_class else None
            draw_partition(
                data.shards,
                y.numpy(),
                data.dataset.classes,
                loop.folder / "partition.png",
                groups=None if held is None else class_groups(held),
                local_test=data.local_test,
            )
        if loop.server.clock is not None:
            from fedsim.system.picture import draw_fleet

            draw_fleet(loop.server.clock, loop.folder / "devices.png")
    except Exception as e:
        logging.getLogger(__name__).warning("pictures of %s could not be drawn: %s", loop.folder, e)


def summarise(loop: Loop, config: DictConfig, data: FederatedData) -> dict[str, Any]:
    """What ``summary.json`` says of the finished rounds, beside its status."""
    rows = loop.history
    out: dict[str, Any] = {
        "method": method_name(config),
        "name": run_name(config),
        "seed": config.seed,
        "rounds": loop.done,
        "key": loop.key,
        "partition_hash": data.shards.hash(),
    }
    for name in ("loss", "accuracy", "clients/loss", "clients/accuracy"):
        values = [r[name] for r in rows if r.get(name) is not None]
        if values:
            out[name] = values[-1]
            out[f"best_{name}"] = min(values) if name.endswith("loss") else max(values)
    if config.evaluation.target is not None:
        reached = (r["round"] for r in rows if (r.get("accuracy") or 0) >= config.evaluation.target)
        out["rounds_to_target"] = next(reached, None)
    for name in ("bytes_up", "bytes_down", "seconds", "sim_seconds", "joules"):
        if any(r.get(name) is not None for r in rows):
            out[name] = sum(r.get(name) or 0 for r in rows)
    for phase in sorted({k for r in rows for k, v in r.items() if isinstance(v, dict) and "bytes_up" in v}):
        parts = [r[phase] for r in rows if phase in r]
        out[phase] = {k: sum(part[k] for part in parts) for k in ("bytes_up", "bytes_down", "seconds")}
    if rows:
        out["weights_hash"] = rows[-1]["weights_hash"]
    return out
