"""From overrides, a file or plain values to a typed configuration, and back to plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.config.explain import UNSAID, explain
from fedsim.config.moved import as_today
from fedsim.config.reading import composed
from fedsim.config.schema import ENGINES, EngineConfig, RunConfig
from fedsim.config.words import readable
from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError

# what Hydra raises on bad overrides
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, *UNSAID)


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
        config, choice = composed(readable(overrides))
    except COMPOSE_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error
    return label_method(config, choice)


def load(path: Path) -> DictConfig:
    """Read a run's ``config.yaml`` back into its types; what a run of before recorded, as of today.

    Raises:
        ConfigError: if the file is missing or holds a key or value that no run can have.
    """
    values = read_yaml(path, ": not a run's configuration", recorded=True)
    try:
        config = typed(as_today(values))
    except (OmegaConfBaseException, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a run's configuration: {str(error).splitlines()[0]}") from error
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{path}: not a run's configuration: {missing[0]} is missing")
    return config


def typed(values: dict[str, Any]) -> DictConfig:
    """A configuration from plain values: refuses what is unknown or of the wrong type, as OmegaConf does."""
    schema = OmegaConf.structured(RunConfig)
    engine = ENGINES.get(values.get("engine", {}).get("name"), EngineConfig)
    schema.engine = OmegaConf.structured(engine)
    return cast(DictConfig, OmegaConf.merge(schema, values))


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain Python values, for workers, trackers and files."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def label_method(config: DictConfig, choice: str | None) -> DictConfig:
    """Fill in ``method`` by the strategy option chosen (in place), unless the user named the method."""
    if config.method is None and choice:
        config.method = choice.rsplit("/", 1)[-1]
    return config
