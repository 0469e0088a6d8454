"""Runs from the command line: one, or a Hydra sweep of many, with one report at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedsim.cli.asjson import aside, document
from fedsim.cli.exits import BAD_CONFIG, DONE, FAILED, TERMINATED, Terminated, diagnose, terminable
from fedsim.cli.flags import JSON, arranged
from fedsim.cli.sweep import JobResult, Journal, leave_nothing
from fedsim.cli.tuning import check_search, optimises, result_of
from fedsim.config.check import validate
from fedsim.config.compose import COMPOSE_ERRORS, label_method, plain, typed
from fedsim.config.explain import explain
from fedsim.config.reading import chosen_method
from fedsim.config.tree import VERSION_BASE, register
from fedsim.config.words import readable, refuse_empty, refuse_twice
from fedsim.engine.cores import available_cores
from fedsim.errors import ConfigError, LockedError
from fedsim.run.key import Finished, finished, run_dir
from fedsim.run.resolve import resolve
from fedsim.run.unread import limit_cohort, refuse_contradictions, say


def launch(argv: Sequence[str]) -> int:
    """Hand ``argv`` to Hydra, run the jobs it makes of them, report. Returns the exit code."""
    register()
    flags, settings = arranged(argv)
    as_json = JSON in flags
    with aside(as_json):
        outcomes, code = _launched([flag for flag in flags if flag != JSON], settings)
    if as_json and any(outcome.code != BAD_CONFIG for outcome in outcomes):
        print(document(outcomes, code), end="", flush=True)
    return code


def _launched(flags: Sequence[str], settings: Sequence[str]) -> tuple[list[JobResult], int]:
    """How the jobs ended, and the exit code."""
    refuse_twice(settings, "-m for a run of each")
    argv = [*flags, *readable(settings)]
    if sweep := not {"-m", "--multirun"}.isdisjoint(flags):
        refuse_empty(settings)
    app = hydra.main(version_base=VERSION_BASE, config_path="pkg://conf", config_name="config")(run_job)
    with Journal.opened() as journal, _hydra_process(argv):
        try:
            app()
            _come_back(journal)
        except COMPOSE_ERRORS as error:
            leave_nothing()
            raise ConfigError(explain(error, argv)) from error
        except KeyboardInterrupt:
            _conclude(journal.read())
            raise
        finally:
            _stop_ray()
        outcomes = journal.read()
    if sweep and not outcomes:
        raise ConfigError("the sweep has no run: a glob(...) or choice(...) in it fits nothing")
    return outcomes, _conclude(outcomes)


def run_job(config: DictConfig) -> float:
    """One run, as Hydra's task. It raises only on Ctrl-C, and in a search that has nothing to choose by: a failed job
    does not end a sweep.

    Returns:
        The objective of validation data, for sweepers that optimise (``experiment=search``); NaN if the run failed or
        has none.
    """
    info = HydraConfig.get()
    sweep = info.mode == RunMode.MULTIRUN
    label_method(config, chosen_method(info.runtime.choices))
    outcome = JobResult(
        job=info.job.num if sweep else 0, overrides=info.job.override_dirname if sweep else ""
    )
    if sweep and optimises(info):
        check_search(config, info)
    try:
        with terminable():
            summary = _attempt(config, outcome, info)
    except Terminated:
        if Journal.elsewhere():  # a process that works for a sweep: no other job may begin here
            os._exit(TERMINATED)
        raise
    return result_of(config, outcome.dir, summary)


def _in_a_grid(info: HydraConf) -> bool:
    """Whether nobody waits for the result of this job: it may be computed after all others of its sweep."""
    return not optimises(info)


def _attempt(
    config: DictConfig, outcome: JobResult, info: HydraConf | None = None
) -> Mapping[str, Any] | None:
    """Do a job, unless it is done; the summary of its run. How it ended goes into ``outcome`` and the journal.

    A run of a sweep that another process computes is left for later or, without ``info``, waited for.
    """
    summary: Mapping[str, Any] | None = None
    overrides = [] if info is None else list(info.overrides.task)
    try:
        if info is not None and (line := limit_cohort(config, overrides)):
            print(line, flush=True)
        validate(config)
        refuse_contradictions(config, overrides)
        resolve(config)
        if info is not None:
            _share_cores(config, info)
        summary = _unless_done(config, outcome, overrides)
    except LockedError as locked:
        if not outcome.overrides:
            _fail(outcome, locked, overrides)
        elif info is not None and _in_a_grid(info):
            outcome.status, outcome.config = "locked", plain(config)
            print(f"{outcome.title}{locked.folder} is being computed by another process; later", flush=True)
        else:
            from fedsim.run.folder import wait

            print(f"{outcome.title}waiting for another process that computes {locked.folder}", flush=True)
            wait(locked.folder)
            return _attempt(config, outcome)
    except Exception as error:
        _fail(outcome, error, overrides)
    Journal.append(outcome)
    return summary


def _fail(outcome: JobResult, error: Exception, overrides: Sequence[str]) -> None:
    outcome.status = "failed"
    outcome.code, outcome.message = diagnose(error, overrides)
    print(outcome.message, file=sys.stderr, flush=True)


def _unless_done(config: DictConfig, outcome: JobResult, overrides: Sequence[str]) -> Mapping[str, Any]:
    """The summary of a run that is done, or is done now."""
    if (found := finished(config)) is None:
        return _run(config, outcome, overrides)
    outcome.dir, outcome.status = str(found.folder), "skipped"
    print(f"{outcome.title}already done, skipped: {found}{_logged(config, found)}", flush=True)
    return found.summary


def _come_back(journal: Journal) -> None:
    """To the jobs whose runs other processes computed when it was their turn."""
    for outcome in journal.read():
        if outcome.config is not None:
            config, outcome.config = typed(outcome.config), None
            _attempt(config, outcome)


def _run(config: DictConfig, outcome: JobResult, overrides: Sequence[str]) -> dict[str, Any]:
    _start_ray(config)
    outcome.dir = str(run_dir(config))
    if outcome.title:
        print(f"{outcome.title}{outcome.dir}", flush=True)
    from fedsim.api import run
    from fedsim.run.provenance import command_line

    say(config, overrides)
    with command_line(overrides):
        result = run(config)
    outcome.dir, outcome.status = str(result.dir), "done"
    return result.summary


def _logged(config: DictConfig, found: Finished) -> str:
    """Let trackers that were named since the run was finished have its rows; words on it."""
    if config.tracker.wandb.mode == "disabled" and not config.tracker.tensorboard:
        return ""
    from fedsim.run.logged import log_finished

    names = log_finished(config, found)
    return (
        f"; its rows are now in {' and '.join(f'{found.folder}/{name}' for name in names)}" if names else ""
    )


def _start_ray(config: DictConfig) -> None:
    """Start Ray beside the imports of torch and the simulator: they take about as long as each other."""
    if config.engine.name == "ray":
        from fedsim.engine.ray import cluster

        cluster.warm_up(config.engine)


def _stop_ray() -> None:
    """Jobs of one process share one Ray, which the engine leaves up; stop it if this process started it."""
    cluster: Any = sys.modules.get("fedsim.engine.ray.cluster")
    if cluster is not None:
        cluster.shutdown()


def _share_cores(config: DictConfig, info: HydraConf) -> None:
    """Jobs that run at once split the cores, unless `engine.workers` is given; the bits stay the same."""
    at_once = OmegaConf.select(cast(DictConfig, info), "launcher.n_jobs")
    if config.engine.name == "ray" and config.engine.workers == 0 and at_once:
        cores = available_cores()
        config.engine.workers = max(1, cores // (at_once if at_once > 0 else cores))


@contextmanager
def _hydra_process(argv: Sequence[str]) -> Iterator[None]:
    """What Hydra's entry point reads from the process: arguments, and the wish to let exceptions out."""
    saved, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["fedsim", *argv], "1"
    try:
        yield
    finally:
        sys.argv = saved
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _conclude(outcomes: list[JobResult]) -> int:
    """Table and curves of the runs that are done, then the table of those that failed."""
    folders = list(dict.fromkeys(Path(o.dir) for o in outcomes if o.status in ("done", "skipped")))
    sweep = any(o.overrides for o in outcomes)
    if folders:
        from fedsim.report.terminal import show

        show(folders, draw=sweep)
    failed = [o for o in outcomes if o.status == "failed"]
    if not failed:
        return DONE
    if sweep:
        print(f"\nfedsim: {len(failed)} of {len(outcomes)} jobs failed", file=sys.stderr)
        width = max(len(o.overrides) for o in failed)
        for o in failed:
            print(f"  {o.job:>3}  {o.overrides:<{width}}  {o.reason}", file=sys.stderr)
    return BAD_CONFIG if all(o.code == BAD_CONFIG for o in failed) else FAILED


@contextmanager
def jobs() -> Iterator[Callable[[DictConfig, JobResult], JobResult]]:
    """Runs of commands that make their configurations themselves: a function that does one, unless it is done.

    Like a job of a sweep it prints how it ended, and fails without ending the others.
    """

    def do(config: DictConfig, outcome: JobResult) -> JobResult:
        _attempt(config, outcome)
        return outcome

    with Journal.opened():
        try:
            yield do
        finally:
            _stop_ray()
