"""A run computed again, serially, as far as it is looked at."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fedsim.config.check import validate
from fedsim.config.compose import load, plain, typed
from fedsim.config.schema import EngineConfig
from fedsim.errors import ConfigError
from fedsim.tracking.rows import packed, read_rows, stream_rows

if TYPE_CHECKING:
    from fedsim.engine.assignments import Plan
    from fedsim.engine.worker import Worker
    from fedsim.run.result import RunResult


PRETRAINED, UPLOADS = "pretrained", "uploads"  # folders: of all runs below ``out``; of a run


def as_simulation(config: DictConfig, folder: str) -> DictConfig:
    """The same run on the serial engine, from scratch, in another folder, telling nobody: models that clients handed
    over once are asked for again too, where pretrained ones are found."""
    values = plain(serially(config))
    if (pretrained := Path(values["out"]).resolve() / PRETRAINED).is_dir():
        (Path(folder) / PRETRAINED).symlink_to(pretrained)
    values |= {"dir": folder, "out": folder, "resume": "never"}
    values["tracker"]["console"]["mode"] = "quiet"
    values["tracker"]["wandb"]["mode"] = "disabled"
    values["tracker"] |= {"tensorboard": False, "plots": False, "update_hashes": False, "prometheus": None}
    values["checkpoint"] |= {"every": 0, "keep": "last"}
    return typed(values)


def serially(config: DictConfig) -> DictConfig:
    """The same settings on the serial engine."""
    values = plain(config)
    values["engine"] = {f.name: values["engine"][f.name] for f in dataclasses.fields(EngineConfig)}
    values["engine"] |= {"name": "serial", "workers": 1}
    return typed(values)


def weights_hashes(run: Path) -> dict[int, str]:
    """The recorded hash of the weights by round, in order.

    Raises:
        ConfigError: if there is no such record.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run}: no run folder: it has no metrics.jsonl")
    rows = [row for row in read_rows(path) if row.get("weights_hash") and isinstance(row.get("round"), int)]
    return {row["round"]: str(row["weights_hash"]) for row in sorted(rows, key=lambda row: row["round"])}


def handed_over(config: DictConfig) -> list[str]:
    """Parts of a run that were handed over in Python: its configuration alone does not give it again."""
    return [k for k in ("strategy", "model", "data") if "given" in (config.get(k) or {})]


class Stop:
    """Ends a run after ``round``; knows which one is under way."""

    def __init__(self, round: int):
        self.last, self.now = round, 1

    def round(self, info: Any) -> None:
        """A callback's hook."""
        self.now = info.round + 1
        if info.round == self.last:
            info.stop(f"computed as far as round {info.round}")


@contextmanager
def computed(
    run: Path,
    stop: Stop,
    worker: Callable[[Plan], Worker] | None = None,
    handed: Mapping[str, Any] | None = None,
    callbacks: Sequence[object] = (),
) -> Iterator[RunResult]:
    """The run in the folder ``run`` computed again until ``stop``, in a folder that is gone at the end.

    It starts at the last checkpoint before that round, if there is one, else from scratch. A deployment is simulated on
    its recorded cohorts. ``worker`` makes the worker; ``handed`` is what was handed over in Python.

    Raises:
        ConfigError: if it cannot be computed again here: of what was handed over in Python, or of nodes' own data,
            there is no copy.
    """
    from fedsim import api
    from fedsim.engine.base import SerialEngine
    from fedsim.engine.worker import Worker
    from fedsim.flower.replay import DeploymentRecord, ReplayEngine

    recorded = load(run / "config.yaml")
    if (objects := handed_over(recorded)) and handed is None:
        raise ConfigError(
            f"{run}: {' and '.join(objects)} of this run were handed over in Python; it cannot be computed again from "
            "its folder"
        )
    with tempfile.TemporaryDirectory(prefix="fedsim-again-") as place:
        config = as_simulation(recorded, place)
        more: dict[str, Any] = dict(handed or {})
        if (record := DeploymentRecord.of(run)) is not None:
            more["engine"] = ReplayEngine(record, worker or Worker)
            more["cohorts"] = record.cohorts if len(record.cohorts) >= config.rounds else None
        else:
            more["engine"] = SerialEngine(worker or Worker)
            if not handed and begin_at(run, stop.last, config, Path(place)):
                stop.now, config.resume = rounds_there(Path(place)) + 1, "auto"
        validate(config)
        yield api.run(config, callbacks=[stop, *callbacks], **more)


def begin_at(run: Path, round: int, config: DictConfig, place: Path, mark: str = "/serial") -> bool:
    """Copy the newest checkpoint of ``run`` before ``round`` to ``place``, as one of ``config``; whether there is one.

    ``mark``: of the engine that is handed over, which is part of a checkpoint's key.
    """
    from fedsim.run.key import keys_before, marked, run_key
    from fedsim.server import checkpoint

    recorded = load(run / "config.yaml")
    found = checkpoint.before(run / "checkpoint", round)
    own = {run_key(recorded), *keys_before(recorded)}
    if found is None or checkpoint.key_of(found) not in own or checkpoint.rounds_of(found) == 0:
        return False
    target, done = place / "checkpoint", checkpoint.rounds_of(found)
    target.mkdir(parents=True, exist_ok=True)
    for segment in checkpoint.segments_of(found):
        shutil.copy(run / "checkpoint" / segment, target / segment)
    for log in ("metrics.jsonl", "clients.jsonl"):
        kept = (row for row in stream_rows(run / log) if row["round"] <= done)
        with (place / log).open("w") as file:
            file.writelines(line + "\n" for line in packed(kept))
    if (run / UPLOADS).is_dir():
        shutil.copytree(run / UPLOADS, place / UPLOADS)
    scratch = target / f".{found.name}.tmp"
    shutil.copytree(found, scratch, dirs_exist_ok=True)
    checkpoint.change_key(scratch, marked(run_key(config), mark))
    scratch.rename(target / found.name)  # last: where it is, all is
    return True


def rounds_there(place: Path) -> int:
    """Finished rounds in the newest checkpoint of a run folder."""
    from fedsim.server import checkpoint

    found = checkpoint.latest(place / "checkpoint")
    return 0 if found is None else checkpoint.rounds_of(found)
