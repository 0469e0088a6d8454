"""The run folder: one writer at a time, and what an earlier run left in it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim.errors import ConfigError
from fedsim.server import checkpoint
from fedsim.server.collusion import ATTACKERS


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
