"""What a run is called and where it lies: the key of all settings that can change a result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim.config.compose import load, plain
from fedsim.config.roles import telling
from fedsim.errors import ConfigError


def method_name(config: DictConfig) -> str:
    """Short name of the method: ``method`` if set, else the module of the strategy's ``_target_``."""
    if config.get("method"):
        return str(config.method)
    target = str(OmegaConf.select(config, "strategy._target_") or "custom")
    return target.split(".")[-2] if "." in target else target


def run_key(config: DictConfig) -> str:
    """sha256 (64 hex digits; the first 8 name the run folder) of all settings that can change a result.

    The order of overrides does not matter, nor whether a number is written ``1`` or ``1.0``.
    """
    values = _canonical(telling(plain(config)))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run_name(config: DictConfig) -> str:
    """``<method>-s<seed>-<first 8 digits of the key>``, e.g. ``fedspeed-s0-1a2b3c4d``."""
    return f"{method_name(config)}-s{config.seed}-{run_key(config)[:8]}"


def run_dir(config: DictConfig) -> Path:
    """Folder of the run: ``dir`` if set, else ``out/name/<run name>``."""
    return Path(config.dir) if config.dir else Path(config.out) / config.name / run_name(config)


def finished(config: DictConfig) -> dict[str, Any] | None:
    """The summary in the run folder if that holds this very run, finished, and it need not be done again."""
    folder = run_dir(config)
    if config.resume != "auto" or not (folder / "summary.json").is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        same = run_key(load(folder / "config.yaml")) == run_key(config)
    except (ConfigError, ValueError):
        return None  # the run itself will say what is wrong with the folder
    return summary if same and summary.get("status") == "done" else None


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
