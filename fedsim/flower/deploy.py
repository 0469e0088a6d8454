"""``fedsim deploy local``: a SuperLink, SuperNodes and a run on this machine, for trying a deployment out."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.config.compose import compose, plain
from fedsim.config.moved import targets
from fedsim.config.usermodules import is_users
from fedsim.config.words import refuse_twice
from fedsim.errors import ConfigError, EngineError
from fedsim.flower import forkserver
from fedsim.flower.options import deployable, deployed, own_folder
from fedsim.flower.processes import Federation
from fedsim.run.key import finished
from fedsim.run.logged import describe
from fedsim.tracking import read_rows
from fedsim.tracking.console import ConsoleTracker

PRELOAD = {
    forkserver.FURTHER: "fedsim.flower.client"
}  # nodes run the fedsim of this process, whoever packs the app
POLL, ASK = 0.3, 20.0  # seconds between looks at the run folder, and between questions to the link

PROJECT = """\
[project]
name = "deployment"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedsim"
[tool.flwr.app.components]
serverapp = "deployment:server"
clientapp = "deployment:client"
[tool.flwr.app.config]
overrides = ""
"""
MODULE = """\
from fedsim.flower.client import app as client
from fedsim.flower.server import app as server

__all__ = ["client", "server"]
"""


def deploy(argv: Sequence[str]) -> int:
    """Start a SuperLink, SuperNodes and a run on this machine; all of it ends with this command."""
    parser = argparse.ArgumentParser(prog="fedsim deploy", description=(deploy.__doc__ or ""))
    parser.add_argument("where", choices=["local"], help="this machine (several: docs/deployment.md)")
    parser.add_argument(
        "--nodes", type=int, default=3, metavar="N", help="SuperNodes, one per client; default 3"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for a simulation")
    parser.add_argument("--config-dir", "-cd", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.config_dir is not None:
        raise ConfigError(
            f"--config-dir {args.config_dir}: nodes read no folder of yours; type what the option says, as "
            "method=NAME strategy._target_=my_method.MyMethod strategy.weighting=uniform, or put it into conf/"
        )
    if args.nodes < 1:
        raise ConfigError(f"--nodes {args.nodes}: must be at least 1")
    refuse_twice(args.overrides)
    overrides = for_nodes(args.overrides, args.nodes)
    config = deployed(overrides)
    deployable(config)
    named = Path(own_folder(config))
    folder = named.absolute()  # the server's working directory is another
    config.dir = str(folder)
    if (found := finished(config)) is not None:
        print(f"already done, skipped: {replace(found, folder=named)}", flush=True)
    else:
        with _interruptible():
            _run(config, [*overrides, f"dir={folder}"], folder, args.nodes)
    from fedsim.report.terminal import show

    show([named], draw=False)
    return 0


def for_nodes(overrides: Sequence[str], nodes: int) -> list[str]:
    """``overrides`` with as many clients as there are nodes, and no more of them a round."""
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    if given.get("num_clients", str(nodes)) != str(nodes):
        raise ConfigError(
            f"num_clients={given['num_clients']}: every client has a node of its own; "
            f"give --nodes {given['num_clients']}, or leave num_clients out"
        )
    out = [*overrides, f"num_clients={nodes}"]
    if "clients_per_round" not in given:
        out.append(f"clients_per_round={min(nodes, compose(overrides).clients_per_round)}")
    return out


def _run(config: DictConfig, overrides: Sequence[str], folder: Path, nodes: int) -> None:
    """Start everything, follow the run to its end, stop everything. EngineError if the run failed."""
    place = folder / "flower"  # logs, the nodes' state, Flower's own folder
    app = place / "app"
    app.mkdir(parents=True, exist_ok=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "deployment.py").write_text(MODULE)
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier attempt
    own = " ".join(
        sorted({t for _, t in targets(plain(config)) if is_users(t)})
    )  # who submits owns these nodes
    console, summary = ConsoleTracker(config.tracker.console.mode), dict[str, Any]()
    try:
        with Federation(place, env=PRELOAD) as federation:
            console.phase("starting the SuperLink")
            federation.link()
            federation.ready("link")
            console.phase(f"starting {nodes} SuperNodes")
            names = [f"node-{k}" for k in range(nodes)]
            ports = [
                federation.node(
                    name, {"partition-id": k, "state-dir": str(place / f"state-{k}"), "allow": own}
                )
                for k, name in enumerate(names)
            ]
            for name, port in zip(names, ports, strict=True):
                federation.ready(name, port)
            console.phase("submitting the run")
            run = federation.submit(app, shlex.join(overrides))
            summary = _follow(federation, run, config, folder, console)
    except BaseException as error:
        summary = {
            "status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            "error": str(error),
        }
        raise
    finally:
        console.end(summary)


def _follow(
    federation: Federation, run: str, config: DictConfig, folder: Path, console: ConsoleTracker
) -> Any:
    """Show rounds as they come; the summary of the finished run. EngineError if it failed or a process died."""
    begun = _rows(folder)
    before = len(begun)
    console.start(describe(config, folder, before, begun))
    console.phase("waiting for the nodes")
    seen, asked = before, time.monotonic()
    while True:
        ended = (folder / "summary.json").exists()
        rows = _rows(folder)
        for row in rows[seen:]:
            console.round(row, ())
        seen = max(seen, len(rows))
        if ended:
            break
        for name, process in federation.running.items():
            if process.poll() is not None:
                raise EngineError(f"{name} ended with {process.returncode}:\n{federation.log(name)}")
        if time.monotonic() - asked > ASK:
            asked = time.monotonic()
            status, details = federation.status(run)
            if status.startswith("finished") and not (folder / "summary.json").exists():
                raise EngineError(f"the run ended ({status}): {details}\nlogs: {folder / 'flower'}")
        time.sleep(POLL)
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "done":
        raise EngineError(f"the run {summary['status']}: {summary.get('error')}\nlogs: {folder / 'flower'}")
    return summary


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end this command as Ctrl-C does: everything started is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
