"""Running a simulation: ``simulate`` from Python, ``run`` for a composed configuration."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsim import build, checkpoint
from fedsim.build import Pair, typed
from fedsim.clientstore import ClientStore
from fedsim.cohort import check_cohorts
from fedsim.config import CheckpointConfig, ClientConfig, EvaluationConfig, FailureConfig, RayConfig
from fedsim.data.federated import FederatedData
from fedsim.engine.base import Engine, SerialEngine, pick_device
from fedsim.engine.worker import Plan
from fedsim.errors import ConfigError
from fedsim.loop import Loop
from fedsim.server import Server
from fedsim.settings import compose, method_name, plain, run_dir, run_key, run_name
from fedsim.task import LossFn, Task, cross_entropy
from fedsim.tracking import RunInfo, Trackers, read_rows
from fedsim.tracking import build as build_trackers
from fedsim.validation import validate
from fedsim.vectors import FlatModel, hash_tensors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class RunResult:
    """What a run leaves behind; everything but ``weights`` is read from its folder ``dir``."""

    dir: Path
    weights: dict[str, Tensor]  # state dict of the final global model
    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)  # of metrics.jsonl
    label: str = "run"

    @property
    def history(self) -> pd.DataFrame:
        """One row a round."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def per_client(self) -> pd.DataFrame:
        """Tidy table: round, client, metric, value."""
        import pandas as pd

        return pd.DataFrame(
            read_rows(self.dir / "clients.jsonl"), columns=["round", "client", "metric", "value"]
        )

    def plot(self) -> Figure:
        """Accuracy and loss against rounds."""
        from fedsim.report import figure_of

        return figure_of({self.label: [self.rows]})


@dataclass(frozen=True)
class Given:
    """What a caller hands over in Python instead of naming it in the configuration.

    Args:
        model: a module, or a factory called under the run's seed; default: ``config.model``.
        clients: one ``(x, y)`` pair per client, instead of ``config.data`` and ``config.partition``.
        test: ``(x, y)`` of the common test set, with ``clients``.
        loss: ``(model output, y) -> scalar``, the mean over the batch; default: cross entropy.
        initial: state dict that the run starts from.
        cohorts: client ids of each round, instead of sampling.
        strategy: a strategy object or class, instead of ``config.strategy``.
        callbacks: further trackers, objects with any of the hooks of ``fedsim.tracking.Tracker``.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    clients: Sequence[Pair] | None = None
    test: Pair | None = None
    loss: LossFn | None = None
    initial: Mapping[str, Tensor] | None = None
    cohorts: Sequence[Sequence[int]] | None = None
    strategy: Any = None
    callbacks: Sequence[object] = ()

    def fingerprint(self) -> str:
        """Identifies the handed-over parts in a checkpoint; empty if there are none."""
        parts: list[str] = []
        if isinstance(self.model, nn.Module):
            parts.append("model" + hash_tensors(self.model.state_dict().values()))
        elif self.model is not None:
            parts.append(f"model{getattr(self.model, '__qualname__', type(self.model).__qualname__)}")
        pairs = [*(self.clients or ()), *([self.test] if self.test else ())]
        if pairs:
            parts.append("data" + hash_tensors(torch.as_tensor(t) for pair in pairs for t in pair))
        if self.initial is not None:
            parts.append("initial" + hash_tensors(torch.as_tensor(t) for t in self.initial.values()))
        if self.cohorts is not None:
            parts.append(f"cohorts{[list(map(int, c)) for c in self.cohorts]}")
        for name, thing in (("strategy", self.strategy), ("loss", self.loss)):
            if thing is not None:
                parts.append(f"{name}{getattr(thing, '__qualname__', type(thing).__qualname__)}")
        return "/".join(parts)


def simulate(
    overrides: Sequence[str] = (),
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    clients: Sequence[Pair] | None = None,
    test: Pair | None = None,
    loss: LossFn | None = None,
    initial: Mapping[str, Tensor] | None = None,
    cohorts: Sequence[Sequence[int]] | None = None,
    strategy: Any = None,
    callbacks: Sequence[object] = (),
) -> RunResult:
    """Run one simulation and return its result.

    ``overrides`` are settings as on the command line, e.g. ``["strategy=fedspeed", "rounds=20", "engine=serial"]``; the
    keyword arguments are those of :class:`Given`. Unless ``dir=...`` is among the overrides, the run gets a new folder
    under ``out/name``.

    Raises:
        ConfigError, DataError: before anything is started, if the settings or data cannot work.
        ClientError: if a client failed and the policy is to stop. Rows and the last finished round are kept.
    """
    config = compose(overrides)
    if config.dir is None:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000_000:09d}"
        config.dir = str(Path(config.out) / config.name / f"{run_name(config)}-{stamp}")
    return run(
        config,
        model=model,
        clients=clients,
        test=test,
        loss=loss,
        initial=initial,
        cohorts=cohorts,
        strategy=strategy,
        callbacks=callbacks,
    )


def run(config: DictConfig, **handed: Any) -> RunResult:
    """Run a composed configuration; keyword arguments and errors as in :func:`simulate`.

    A run whose folder is finished is not run again, a half-finished one continues from its checkpoint
    (``resume=never`` starts afresh).
    """
    given = Given(**handed)
    _settle(config, given)
    folder, key = run_dir(config), run_key(config)
    if mark := given.fingerprint():
        key = hashlib.sha256(f"{key}/{mark}".encode()).hexdigest()
    previous = _enter(folder, config, key)
    if previous is not None and (done := _finished(folder, config)) is not None:
        state = load_file(folder / "weights.safetensors")
        return RunResult(folder, state, done, read_rows(folder / "metrics.jsonl"), str(done["method"]))
    method = build.strategy(config, given.strategy)
    trackers = build_trackers(config.tracker, extra=list(given.callbacks))
    engine = None
    try:
        trackers.phase("loading data")
        data = _data(config, given)
        task = Task(build.model(config, data.dataset, given.model), given.loss or cross_entropy)
        trackers.phase(f"starting the {config.engine.name} engine")
        engine = _engine(config)
        loop = _loop(config, given, method, task, data, engine, trackers, key)
        if previous is not None:
            loop.restore(previous)
            loop.history = [r for r in read_rows(folder / "metrics.jsonl") if r["round"] <= loop.done]
        trackers.start(_info(config, folder, loop.done))
        data.shards.save(folder / "partition.npz")
        return _execute(loop, config, task, data)
    finally:
        if engine is not None:
            engine.close()


def _settle(config: DictConfig, given: Given) -> None:
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
    validate(config)


def _enter(folder: Path, config: DictConfig, key: str) -> Path | None:
    """Make the run folder; the checkpoint to continue from, if there is one."""
    if config.resume == "never" and folder.exists():
        for name in ("checkpoint", "wandb", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "clients.jsonl", "summary.json", "weights.safetensors", "config.yaml"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    previous = checkpoint.latest(folder / "checkpoint")
    if previous is not None:
        checkpoint.load(previous, key)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    return previous


def _finished(folder: Path, config: DictConfig) -> dict[str, Any] | None:
    """The summary of a finished run, or ``None``."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    done = summary.get("status") == "done" and (folder / "weights.safetensors").exists()
    return summary if done else None


def _data(config: DictConfig, given: Given) -> FederatedData:
    if given.clients is not None:
        return build.given_clients(config, given.clients, given.test)
    return build.split(config, build.dataset(config))


def _engine(config: DictConfig) -> Engine:
    if config.engine.name == "serial":
        return SerialEngine()
    from fedsim.engine.ray import RayEngine

    return RayEngine(typed(config.engine, RayConfig))


def _loop(
    config: DictConfig,
    given: Given,
    method: Any,
    task: Task,
    data: FederatedData,
    engine: Engine,
    trackers: Trackers,
    key: str,
) -> Loop:
    dtype, folder = build.DTYPES[config.dtype], run_dir(config)
    local, failures = typed(config.client, ClientConfig), typed(config.failures, FailureConfig)
    plan = Plan(
        task=task,
        client=method.client,
        data=data,
        local=local,
        failures=failures,
        seed=config.seed,
        dtype=dtype,
        buffers=config.buffers,
        threads=config.engine.threads,
        device=pick_device(config.engine.device),
        vectorize=config.engine.vectorize,
    )
    engine.start(plan)
    start = FlatModel(copy.deepcopy(task.model), dtype)
    if given.initial is not None:
        start.load(start.layout.flatten(given.initial, dtype))
        if len(start.buffers):
            start.buffers.copy_(start.layout.flatten_buffers(given.initial, dtype))
    checkpoints = typed(config.checkpoint, CheckpointConfig)
    server = Server(
        engine=engine,
        task=task,
        layout=start.layout,
        start=start.weights,
        sizes=data.shards.sizes,
        local=local,
        failures=failures,
        states=ClientStore(folder / "checkpoint", checkpoints.memory_mb << 20),
        seed=config.seed,
        dtype=dtype,
        chunks=config.engine.chunks,
        share_buffers=config.buffers == "average",
        test_size=0 if data.dataset.test is None else len(data.dataset.test),
        eval_batch=config.evaluation.batch_size,
    )
    return Loop(
        strategy=method,
        server=server,
        trackers=trackers,
        rounds=config.rounds,
        clients_per_round=config.clients_per_round,
        participation=config.participation,
        evaluation=typed(config.evaluation, EvaluationConfig),
        checkpoints=checkpoints,
        folder=folder,
        key=key,
        cohorts=None
        if given.cohorts is None
        else check_cohorts(given.cohorts, config.rounds, config.num_clients),
    )


def _info(config: DictConfig, folder: Path, start_round: int) -> RunInfo:
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


def _execute(loop: Loop, config: DictConfig, task: Task, data: FederatedData) -> RunResult:
    """Run the loop; whatever happens, the trackers hear how it ended."""
    try:
        loop.run()
    except BaseException as e:
        status = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
        loop.trackers.end({**_summary(loop, config), "status": status, "error": f"{type(e).__name__}: {e}"})
        raise
    model = FlatModel(copy.deepcopy(task.model), loop.server.dtype)
    weights = model.state_dict(loop.models()["global"])
    save_file({k: v.contiguous() for k, v in weights.items()}, loop.folder / "weights.safetensors")
    summary = {**_summary(loop, config), "status": "done", "partition_hash": data.shards.hash()}
    if config.tracker.plots:
        _draw(loop, data)
    loop.trackers.end(summary)
    return RunResult(loop.folder, weights, summary, loop.history, str(summary["method"]))


def _draw(loop: Loop, data: FederatedData) -> None:
    """Curves, and the partition as a heat map. A picture that fails costs a warning, not the run."""
    from fedsim.data.picture import draw_partition
    from fedsim.report import figure_of

    try:
        figure_of({"run": [loop.history]}).savefig(loop.folder / "curves.png", dpi=150)
        y = data.dataset.train.y
        if data.dataset.num_classes and y.dim() == 1:
            draw_partition(data.shards, y.numpy(), data.dataset.classes, loop.folder / "partition.png")
    except Exception as e:
        logging.getLogger(__name__).warning("pictures of %s could not be drawn: %s", loop.folder, e)


def _summary(loop: Loop, config: DictConfig) -> dict[str, Any]:
    rows = loop.history
    out: dict[str, Any] = {
        "method": method_name(config),
        "name": run_name(config),
        "seed": config.seed,
        "rounds": loop.done,
        "key": loop.key,
    }
    for name in ("loss", "accuracy"):
        values = [r[name] for r in rows if r.get(name) is not None]
        if values:
            out[name] = values[-1]
            out[f"best_{name}"] = min(values) if name == "loss" else max(values)
    if config.evaluation.target is not None:
        reached = (r["round"] for r in rows if (r.get("accuracy") or 0) >= config.evaluation.target)
        out["rounds_to_target"] = next(reached, None)
    for name in ("bytes_up", "bytes_down", "seconds"):
        out[name] = sum(r[name] for r in rows)
    if rows:
        out["weights_hash"] = rows[-1]["weights_hash"]
    return out
