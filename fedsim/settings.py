"""From overrides to a checked configuration, and from a configuration to the place of its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedsim.config import ENGINES, EngineConfig, RunConfig, config_loader
from fedsim.errors import ConfigError
from fedsim.explain import explain

# What changes neither a weight nor a metric: where results go, who is told, and how the work is spread.
# `rounds` is not among them, since a schedule may depend on it: a longer run is another run.
NOT_IN_KEY = ("name", "out", "dir", "method", "resume", "tags", "tracker", "checkpoint")
_RAY, _FLOWER = ("address", "store_mb", "timeout"), ("start", "wait_for", "deadline", "poll", "lost_state")
ENGINE_NOT_IN_KEY = ("name", "workers", *_RAY, *_FLOWER)

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # what Hydra raises on bad overrides


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that ``fedsim`` would run with these overrides.

    Args:
        overrides: as on the command line, e.g. ``["strategy=fedspeed", "strategy.rho=0.3"]``. A folder with
            further options is added by ``"hydra.searchpath=[file://my_conf]"``.

    Raises:
        ConfigError: for an unknown key or option, or a value of the wrong type. Impossible values are left to
            :func:`validate`.
    """
    try:
        with config_loader():
            config = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    except COMPOSE_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    choice = chosen_method(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return label_method(config, choice)


def load(path: Path) -> DictConfig:
    """Read a run's ``config.yaml`` back into its types.

    Raises:
        ConfigError: if the file is missing or holds a key or value that no run can have.
    """
    try:
        return typed(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))
    except (OSError, OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: not a run's configuration: {str(error).splitlines()[0]}") from error


def typed(values: dict[str, Any]) -> DictConfig:
    """A configuration from plain values: refuses what is unknown or of the wrong type, as OmegaConf does."""
    schema = OmegaConf.structured(RunConfig)
    engine = ENGINES.get(values.get("engine", {}).get("name"), EngineConfig)
    schema.engine = OmegaConf.structured(engine)
    return cast(DictConfig, OmegaConf.merge(schema, values))


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain Python values, for workers, trackers and files."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def chosen_method(choices: Mapping[str, Any]) -> str | None:
    """The strategy option chosen; for one around another, both: ``ggeur+scaffold``."""
    outer, base = choices.get("strategy"), choices.get("strategy@strategy.base")
    return f"{outer}+{base}" if outer and base else outer


def label_method(config: DictConfig, choice: str | None) -> DictConfig:
    """Fill in ``method`` by the strategy option chosen (in place), unless the user named the method."""
    if config.method is None and choice:
        config.method = choice.rsplit("/", 1)[-1]
    return config


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
    values = {k: v for k, v in plain(config).items() if k not in NOT_IN_KEY}
    values["engine"] = {k: v for k, v in values["engine"].items() if k not in ENGINE_NOT_IN_KEY}
    return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()


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
