"""Running a simulation: ``simulate`` from Python, ``run`` for a composed configuration."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor, nn

from fedsim.config.compose import compose
from fedsim.data.containers import listed
from fedsim.data.dataset import Augment, Dataset, Pair
from fedsim.data.federated import FederatedData
from fedsim.engine.allocator import keeping
from fedsim.engine.base import Engine
from fedsim.errors import ConfigError
from fedsim.rng import taking_turns, undisturbed
from fedsim.run import assigning, caller_modes, disjoint, initial, modelcard, participants, samples
from fedsim.run.assembly import assemble, start_engine
from fedsim.run.denser import complete_rows, take_over
from fedsim.run.folder import adopt, complete, enter, locked, said_if_full, tidied
from fedsim.run.forms import check_forms
from fedsim.run.given import Given
from fedsim.run.key import Finished, marked, run_dir, run_key, run_name
from fedsim.run.logged import describe, log_finished
from fedsim.run.machine import ask_git
from fedsim.run.needs import check_classes, check_cohort, check_labelled, check_task
from fedsim.run.personal import Source
from fedsim.run.preparation import learning_task, load_data, settle, unmeasured
from fedsim.run.pretraining import pretrained
from fedsim.run.provenance import Record
from fedsim.run.result import RunResult, load_run
from fedsim.run.sendable import check_sent
from fedsim.run.sound import check_privacy
from fedsim.run.summary import execute, record_partition, summarise
from fedsim.run.unread import limit_cohort, say
from fedsim.run.unscaled import unscaled
from fedsim.server import weightsfile
from fedsim.server.loop import Loop
from fedsim.server.traits import StrategyLike
from fedsim.task.losses import Forward, LossFn
from fedsim.tracking import build as build_trackers
from fedsim.tracking.callbacks import admitted
from fedsim.tracking.rows import lasting, rows_of

if TYPE_CHECKING:
    from fedsim.topology import Topology

log = logging.getLogger(__name__)

__all__ = ["RunResult", "load_run", "run", "simulate"]


@taking_turns()
@undisturbed()  # from the first import on: some draw
def simulate(
    overrides: Sequence[str] = (),
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    clients: Sequence[Any] | None = None,
    data: Any = None,
    test: Pair | Mapping[str, Pair] | None = None,
    validation: Any = None,
    server: Any = None,
    domains: Sequence[str] | None = None,
    loss: LossFn | None = None,
    metrics: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    augment: Augment | None = None,
    initial: Mapping[str, Tensor] | None = None,
    cohorts: Sequence[Sequence[int]] | None = None,
    strategy: Any = None,
    callbacks: Sequence[object] = (),
) -> RunResult:
    """Run one simulation and return its result.

    ``overrides`` are settings as on the command line, e.g. ``["strategy=fedspeed", "rounds=20", "engine=serial"]``; the
    keyword arguments are those of :class:`Given`. Unless ``dir=...`` is among the overrides, the run gets a new folder
    under ``out/name``. Runs in several threads of a process take turns.

    Raises:
        ConfigError, DataError: before anything is started, if the settings or data cannot work.
        ClientError: if a client failed and the policy is to stop; what its code raised is the ``__cause__``.
        StrategyError, CallbackError: if code of those is at fault. Rows and the last finished round are kept.
    """
    config = compose(_listed(overrides))
    if clients is not None and not hasattr(clients, "__len__"):
        clients = listed(clients)  # a generator is read once
    say(config, overrides, {"strategy": strategy, "model": model, "clients": clients, "data": data})
    if isinstance(data, Dataset) and data.ids is not None:
        _by_owner(config, data, overrides)
    if cohorts is None and (
        line := limit_cohort(config, overrides, None if clients is None else len(clients))
    ):
        log.warning("%s", line)
    if strategy is not None and not any(o.startswith("method=") for o in overrides):
        named = strategy if isinstance(strategy, type) else type(strategy)
        config.method = named.__name__.lower()
    return run(
        config,
        fresh=config.dir is None,
        model=model,
        clients=clients,
        data=data,
        test=test,
        validation=validation,
        server=server,
        domains=domains,
        loss=loss,
        metrics=metrics,
        forward=forward,
        augment=augment,
        initial=initial,
        cohorts=cohorts,
        strategy=strategy,
        callbacks=callbacks,
    )


def _listed(overrides: Sequence[str]) -> Sequence[str]:
    """Refuse settings that are no list of texts, and sweeps."""
    if isinstance(overrides, str | Mapping) or not all(isinstance(o, str) for o in overrides):
        raise ConfigError(
            'settings are a list of texts, as on the command line: simulate(["rounds=20", "client.lr=0.05"], ...)'
        )
    return overrides


def _by_owner(config: DictConfig, data: Dataset, overrides: Sequence[str]) -> None:
    """Where samples say whose they are and nothing else was asked for, each of those is a client."""
    typed = {o.lstrip("+").partition("=")[0] for o in overrides}
    if typed & {"partition", "partition/"}:
        return
    config.partition = compose(["partition=natural"]).partition
    if "num_clients" not in typed:
        config.num_clients = len(set(np.asarray(data.ids).tolist()))


@taking_turns()
@caller_modes.left()
def run(
    config: DictConfig,
    *,
    fresh: bool = False,
    engine: Engine | None = None,
    split: FederatedData | None = None,
    **handed: Any,
) -> RunResult:
    """Run a composed configuration; further keyword arguments and errors as in :func:`simulate`.

    ``engine``, instead of a new one of the configured kind, and ``split`` data are for whoever runs clients elsewhere.

    The folder is ``dir``, or follows from the settings; ``fresh`` makes a new one for every call. A run whose folder is
    finished is not run again, a half-finished one continues from its checkpoint, and so does a finished one that is
    asked for more rounds (``resume=never`` starts afresh).
    """
    handed["callbacks"] = admitted(handed.get("callbacks", ()))
    given = samples.admitted(config, initial.trainable(config, Given(**handed)))
    given = assigning.handed(given)
    settle(config, given)
    if fresh:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000_000:09d}"
        config.dir = str(Path(config.out) / config.name / f"{run_name(config)}-{stamp}")
    method = participants.strategy(config, given.strategy)
    topology = participants.agreed(config, method)
    check_cohort(method, config, given.cohorts)
    check_privacy(method, config, given.cohorts is not None)
    check_sent(method, config)
    check_labelled(method, config, given)
    check_forms(method, config, given)
    mark = given.fingerprint(alone=fresh) + (f"/{config.engine.name}" if engine is not None else "")
    folder, key = run_dir(config), marked(run_key(config), mark)
    with tidied(folder), locked(folder), said_if_full(folder), undisturbed(), keeping():
        adopt(folder, config, mark)
        take_over(folder, config, mark)
        return _run(config, given, method, topology, folder, key, engine, split)


def _run(
    config: DictConfig,
    given: Given,
    method: StrategyLike,
    topology: Topology | None,
    folder: Path,
    key: str,
    engine: Engine | None,
    data: FederatedData | None,
) -> RunResult:
    source = Source(config, given, key)
    if (done := complete(folder, config, key, stoppable=bool(given.callbacks))) is not None:
        log_finished(config, done)
        return _finished(folder, done, source)
    previous = enter(folder, config, key)
    trackers = build_trackers(config.tracker, extra=given.callbacks)
    summary: dict[str, Any] = {}
    record: Record | None = None
    ask_git()
    try:
        trackers.phase("loading data")
        data = data or load_data(config, given, method)
        for line in filter(None, (unmeasured(config, data), unscaled(config, given, data))):
            log.warning("%s", line)
        given, origin = pretrained(config, given, data, trackers.phase)
        check_classes(method, data)
        disjoint.prove(method, data, folder)
        task = learning_task(config, given, data, method)
        check_task(method, task, data, config.buffers)
        trackers.phase(f"starting the {config.engine.name} engine")
        engine = engine or start_engine(config)
        loop = assemble(config, given, method, task, data, engine, trackers, key, topology)
        if previous is not None:
            _go_on(loop, previous)
        record = Record(folder, config, key, data, loop.done, engine.workers)
        trackers.start(describe(config, folder, loop.done, tuple(loop.history)))
        record_partition(folder, data)
        if loop.server.clock is not None:
            loop.server.clock.fleet.save(folder)
        try:
            weights = execute(loop, config, task, data)
            card = modelcard.write(folder, config, given, task, data, weights, loop.done)
        finally:
            summary = summarise(loop, config, data) | origin
        summary["status"] = "done"
        return RunResult(folder, weights, summary, loop.history, str(summary["method"]), source, card)
    except BaseException as e:
        status = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
        summary |= {"status": status, "error": f"{type(e).__name__}: {e}".removesuffix(": ")}
        raise
    finally:
        with ExitStack() as ending:  # whatever of it fails, or is interrupted once more
            if engine is not None:
                ending.callback(engine.close)
            if record is not None:
                ending.callback(record.finish, summary)
            ending.callback(trackers.end, summary)


def _finished(folder: Path, done: Finished, source: Source) -> RunResult:
    """What the run gave that lies complete in ``folder``."""
    state = weightsfile.read(folder / weightsfile.LAST)
    rows = [lasting(row) for row in rows_of(folder, done.rounds)]
    card = modelcard.read(folder)
    return RunResult(folder, state, dict(done.summary), rows, str(done.summary["method"]), source, card)


def _go_on(loop: Loop, previous: Path) -> None:
    """From a checkpoint, with the rows up to it."""
    complete_rows(loop)
    loop.restore(previous)
    loop.history = [lasting(r) for r in rows_of(loop.folder, loop.done) if r["round"] <= loop.done]
