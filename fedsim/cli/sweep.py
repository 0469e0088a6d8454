"""What the jobs of a sweep share: a journal of how they ended, and one Ray."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from fedsim.errors import headline

_JOURNAL = "FEDSIM_JOURNAL"
_opened_here = False
_made: list[Path] = []  # folders that the sweep of this process made, the inner ones first


@dataclass
class JobResult:
    """How a job ended."""

    job: int  # number in the sweep
    overrides: str  # what sets the job apart in its sweep; empty for a single run
    dir: str = ""
    status: str = "failed"  # done | skipped | failed | locked (another process computes it)
    code: int = 0  # exit code of a failed job
    message: str = ""  # of a failed job, as printed
    config: dict[str, Any] | None = None  # of a locked job, to come back to

    @property
    def title(self) -> str:
        """``"job 3 (seed=1,strategy=fedavg): "``, or nothing for a single run."""
        return f"job {self.job} ({self.overrides}): " if self.overrides else ""

    @property
    def reason(self) -> str:
        """The message in one line, which says what happened."""
        return headline(self.message).removeprefix("fedsim: ")


class Journal:
    """Results on their way from the jobs to the command, through a file: jobs may run in other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Journal]:
        """A new journal, which jobs of this and of child processes find through the environment."""
        global _opened_here
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            path = Path(folder) / "journal.jsonl"
            os.environ[_JOURNAL], _opened_here = str(path), True
            try:
                yield cls(path)
            finally:
                del os.environ[_JOURNAL]
                _opened_here = False

    @staticmethod
    def elsewhere() -> bool:
        """Whether the jobs of this process belong to a sweep of another one."""
        return not _opened_here

    @staticmethod
    def append(outcome: JobResult) -> None:
        """Add a line; appends of one line do not mix."""
        with Path(os.environ[_JOURNAL]).open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    def read(self) -> list[JobResult]:
        """The newest result of each job, by job number; none if no job ran."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        found = {o.job: o for o in (JobResult(**json.loads(line)) for line in lines)}
        return [found[job] for job in sorted(found)]


class RaySweep(Callback):
    """Hydra callback: jobs in several processes (joblib's launcher) attach to one Ray, started before them.

    Jobs of one process need no help, they share what the first of them starts. Ray is not started either if
    ``RAY_ADDRESS`` or ``engine.address`` names a cluster, or if no job uses the Ray engine.
    """

    def __init__(self) -> None:
        self.started = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note which folders the sweep will make; start Ray and export its address."""
        folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir", default=".")))
        _made[:] = [place for place in (folder, *folder.parents) if not place.exists()]
        if not _needs_ray(config):
            return
        from fedsim.engine.ray import cluster

        engine = config.engine
        cluster.share(engine.workers, config.hydra.launcher.n_jobs, engine.get("store_mb", 0))
        self.started = True

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Stop what was started; leave no folder behind for a sweep of which no job was begun."""
        leave_nothing()
        if self.started:
            from fedsim.engine.ray import cluster

            cluster.unshare()


def leave_nothing() -> None:
    """Take away the folders that a sweep has made, if no job of it was begun."""
    outcomes = Journal(Path(os.environ.get(_JOURNAL, ""))).read()
    if _made and not any(outcome.dir and Path(outcome.dir).exists() for outcome in outcomes):
        (_made[0] / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there
            for place in _made:
                place.rmdir()
    _made.clear()


def _needs_ray(config: DictConfig) -> bool:
    """Whether jobs will run in other processes, and any of them with a Ray of their own."""
    choice = [o.partition("=")[2] for o in config.hydra.overrides.task if o.startswith("engine=")]
    engine = choice[-1] if choice else str(config.engine.name)
    return (
        OmegaConf.select(config, "hydra.launcher.n_jobs") is not None
        and "ray" in engine.split(",")
        and "RAY_ADDRESS" not in os.environ
        and not config.engine.get("address")
    )
