"""The run folder: one writer at a time, and what an earlier run left in it."""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedsim.config.compose import load, plain
from fedsim.config.roles import telling
from fedsim.errors import CheckpointError, ConfigError, DataError, LockedError
from fedsim.exchange.ledger import FILE as LEDGER
from fedsim.report.runs import flatten
from fedsim.run.boxes_found import FILE as BOXES
from fedsim.run.key import Finished, finished_in, horizon, keys_before, marked, run_key, same_run
from fedsim.run.made import absent, remove
from fedsim.run.modelcard import CARD
from fedsim.run.predictions import FILE as PREDICTIONS
from fedsim.run.provenance import PROVENANCE
from fedsim.run.writing import FILE as TEXTS
from fedsim.server import checkpoint
from fedsim.server.collusion import ATTACKERS
from fedsim.server.weightsfile import BEST, LAST

log = logging.getLogger(__name__)

HANDED = "other things, or other code, were handed over in Python"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
RESULTS = ("summary.json", LAST, CARD, PREDICTIONS, TEXTS, BOXES)  # written at the end of a run


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """Leave no folder behind for a run that was refused before its first round, nor those made for it."""
    made = absent(folder)
    try:
        yield
    except (ConfigError, DataError):
        record = folder / "metrics.jsonl"
        if not (record.exists() and record.stat().st_size):
            remove(folder, made)
        raise


@contextmanager
def said_if_full(folder: Path) -> Iterator[None]:
    """A disk that is full, or has become read-only, is said in one line, whichever file of the run it was.

    Raises:
        CheckpointError: naming the folder, and the file where the system does.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = error.filename or folder
        raise CheckpointError(
            f"{what} could not be written ({error.strerror}); make room and type the same command again: it goes on "
            "from the last checkpoint"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other processes from writing to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); give another dir=... or out=..."
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(folder) from None
        yield


def wait(folder: Path) -> None:
    """Until no other process is writing to the run folder."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def adopt(folder: Path, config: DictConfig, mark: str) -> None:
    """Give the checkpoint of this very run, left by a version of before, the key of today; others stay as they are."""
    saved = checkpoint.latest(folder / "checkpoint")
    if saved is None or not same_run(folder, config):
        return
    recorded = load(folder / "config.yaml")  # its rounds may be fewer
    old_keys = {marked(old, mark) for old in keys_before(recorded)}
    for path in checkpoint.there(folder / "checkpoint"):
        if checkpoint.key_of(path) in old_keys:
            checkpoint.change_key(path, marked(run_key(config), mark))


def complete(folder: Path, config: DictConfig, key: str, *, stoppable: bool = False) -> Finished | None:
    """What lies in the folder, if that is this run with all its rounds and weights; it is not touched.

    ``stoppable``: there are callbacks, by which one that they stopped early would stop again.

    Raises:
        CheckpointError: if another run lies there.
    """
    saved = checkpoint.latest(folder / "checkpoint")
    if config.resume == "never" or saved is None or not (folder / LAST).exists():
        return None
    found = finished_in(folder, config, stoppable=stoppable)
    if found is not None:
        _check(saved, folder, config, key)
        if found.remarks:
            log.warning("already done, not run again: %s", found)
    return found


def enter(folder: Path, config: DictConfig, key: str) -> Path | None:
    """Prepare the run folder for a run that is not complete; the checkpoint to continue from, if there is one.

    Raises:
        CheckpointError: if another run lies there, or one with more rounds than are asked for.
    """
    if config.resume == "never" and folder.exists():
        for name in ("checkpoint", "wandb", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (
            *RESULTS,
            BEST,
            "metrics.jsonl",
            "clients.jsonl",
            "config.yaml",
            ATTACKERS,
            PROVENANCE,
            LEDGER,
        ):
            (folder / name).unlink(missing_ok=True)
    previous = checkpoint.latest(folder / "checkpoint")
    if previous is not None:
        _refuse_fewer(folder, _check(previous, folder, config, key).rounds, config.rounds)
        for name in RESULTS:  # of the rounds so far: no result of the longer run
            (folder / name).unlink(missing_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    return previous


def _check(saved: Path, folder: Path, config: DictConfig, key: str) -> checkpoint.Checkpoint:
    """The checkpoint, if it is this run's; else the error says in what the other run differs."""
    try:
        return checkpoint.load(saved, key)
    except CheckpointError as error:
        if checkpoint.key_of(saved) in (None, key) or not (folder / "config.yaml").is_file():
            raise
        there, here = (dict(flatten(telling(plain(c)))) for c in (load(folder / "config.yaml"), config))
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        names = [name for name in names if name != "rounds" or horizon(config)]
        other = f"it differs in {', '.join(names[:4])}" if names else HANDED
        raise CheckpointError(f"{error}; {other}") from None


def _refuse_fewer(folder: Path, done: int, wanted: int) -> None:
    """Refuse to end a run, under way to more rounds, after fewer: its last round would not have been measured."""
    try:
        planned = int(load(folder / "config.yaml").rounds)
    except ConfigError:
        planned = wanted
    if done >= wanted and planned > wanted:
        raise CheckpointError(
            f"{folder} holds {done} of {planned} rounds, not fewer than rounds={wanted}; give more than {done} rounds "
            "to go on, another dir, or resume=never to start afresh"
        )
