"""Weights & Biases (extra ``wandb``): one row a round, the clients' last values and pictures at the end."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import re
import secrets
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

from fedsim.errors import ConfigError
from fedsim.tracking.base import Row, RunInfo, Tracker
from fedsim.tracking.rows import scalars

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
MAX_TABLE = 10_000  # rows of the clients' table
MAX_PICTURES = 20


class WandbTracker(Tracker):
    """Sends the run to W&B, or keeps it in ``<run folder>/wandb`` for a later ``wandb sync``.

    ``mode``: ``offline``; ``online`` (a run that cannot be opened raises ``ConfigError``); ``auto``: online
    if a key is configured and the server answers within two seconds, else offline, which one line says. The
    sweep is the group, the method the job type. A resumed run is a new W&B run of the same group, since W&B
    cannot resume offline; its x axis, the round, carries on.
    """

    def __init__(self, mode: str, project: str, entity: str | None = None) -> None:
        self.mode, self.project, self.entity = mode, project, entity
        self._wandb: Any = None
        self._run: Any = None
        self._info: RunInfo | None = None
        self._last: dict[tuple[int, str], tuple[int, float]] = {}  # (client, metric) -> round, value
        self._left_out = False

    def start(self, run: RunInfo) -> None:
        """Open the W&B run; raises ``ConfigError`` if ``mode`` is ``online`` and that fails."""
        try:
            import wandb
        except ImportError as error:
            text = (
                f"tracker.wandb.mode={self.mode} needs the package ({error}): pip install 'fedsim-lab[wandb]'"
            )
            if self.mode == "online":
                raise ConfigError(text) from error
            log.warning("%s; the run goes on without it", text)
            return
        self._wandb, self._info = wandb, run
        mode = choose_mode(wandb) if self.mode == "auto" else self.mode
        if mode == "disabled":
            return
        try:
            self._run = self._init(run, mode)
        except Exception as error:
            if self.mode == "online":
                raise ConfigError(
                    f"tracker.wandb.mode=online: {type(error).__name__}: {error}. "
                    "Run `wandb login`, check the network, or use tracker.wandb.mode=offline"
                ) from error
            if mode == "offline":
                raise
            log.warning("W&B did not open an online run (%s); writing it offline", error)
            self._run = self._init(run, "offline")
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Log the row's numbers in one call, without ``step``: W&B drops rows whose step is not larger."""
        if self._run is None:
            return
        for entry in clients:
            key = (int(entry["client"]), str(entry["metric"]))
            if key in self._last or len(self._last) < MAX_TABLE:
                self._last[key] = (int(entry["round"]), float(entry["value"]))
            else:
                self._left_out = True
        self._run.log(scalars(row))

    def end(self, summary: Row) -> None:
        """Log the clients' last values and the run folder's pictures, fill the summary and close the run."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            self._extras(run)
            facts = {
                k: v for k, v in summary.items() if not k.startswith("best_")
            }  # of test samples: no results
            texts = {key: value for key, value in facts.items() if isinstance(value, str)}
            run.summary.update(texts | scalars(facts, "final/"))
        finally:
            run.finish(exit_code=0 if summary.get("status") == "done" else 1)

    def _init(self, run: RunInfo, mode: str) -> Any:
        part = f"-r{run.start_round}" if run.start_round else ""
        wandb = self._wandb
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=run.group,
            job_type=run.method,
            name=run.name + part,
            id=re.sub(r"[^A-Za-z0-9_-]", "-", run.name)[:48] + part + "-" + secrets.token_hex(3),
            tags=list(run.tags),
            config=dict(run.config),
            dir=str(run.dir),
            mode=mode,
            reinit="create_new",  # the next job of a sweep must not write into this run
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, x_save_requirements=False, init_timeout=20
            ),
        )

    def _extras(self, run: Any) -> None:
        assert self._info is not None
        if self._last:
            rows = [
                [at, client, metric, value] for (client, metric), (at, value) in sorted(self._last.items())
            ]
            name = "clients" if not self._left_out else f"clients (first {MAX_TABLE} values)"
            run.log({name: self._wandb.Table(columns=["round", "client", "metric", "value"], data=rows)})
        pictures = sorted(self._info.dir.glob("*.png"))[:MAX_PICTURES]
        if pictures and importlib.util.find_spec("PIL") is not None:
            run.log({path.stem: self._wandb.Image(str(path)) for path in pictures})


def choose_mode(wandb: ModuleType) -> str:
    """What ``auto`` means: ``WANDB_MODE`` if that forbids the network, else ``online`` if it can work."""
    wish = os.environ.get("WANDB_MODE", "")
    if wish in ("offline", "disabled"):
        return wish
    url = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    host = url.hostname or ""
    if not _has_key(host):
        log.warning("W&B: no key configured (`wandb login`), writing the run offline")
        return "offline"
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        log.warning("W&B: %s cannot be reached (%s), writing the run offline", host, error)
        return "offline"
    return "online"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
