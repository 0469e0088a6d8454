"""Settings of a deployment: Hydra overrides in Flower's run configuration, and what a node says of itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fedsim.config.check import validate
from fedsim.config.compose import compose
from fedsim.errors import ConfigError, hint
from fedsim.run import participants
from fedsim.run.key import run_dir
from fedsim.run.resolve import resolve
from fedsim.server.traits import StrategyLike

Values = Mapping[str, bool | float | int | str]
NODE_KEYS = ("partition-id", "num-partitions", "data-path", "own-data", "state-dir", "state.keep_days")


def configuration(run_config: Values) -> DictConfig:
    """The configuration that ``overrides`` of the run configuration stand for, on the engine ``flower``.

    Raises:
        ConfigError: for anything that ``fedsim`` would refuse, and for settings that a deployment cannot have.
    """
    try:
        given = shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise ConfigError(
            f"overrides={run_config['overrides']!r}: {error}; write them as on a command line"
        ) from None
    return deployed(given)


def deployed(overrides: list[str]) -> DictConfig:
    """``overrides`` composed for a deployment."""
    for o in overrides:
        if o.startswith("engine=") and o != "engine=flower":
            raise ConfigError(f"{o}: clients of a deployment are computed at their nodes; leave it out")
    config = compose(["checkpoint.every=1", *overrides, "engine=flower"])
    if config.checkpoint.every != 1:
        raise ConfigError(
            f"checkpoint.every={config.checkpoint.every}: a deployment saves every round, since nodes keep the state "
            "of one earlier round only; leave it out"
        )
    if config.system:
        raise ConfigError("system: a deployment has real devices, links and absences; leave system out")
    if config.tracker.update_hashes:
        raise ConfigError(
            "tracker.update_hashes=true: nodes send updates, not their hashes; leave it out (fedsim diff computes "
            "what it compares)"
        )
    validate(config)
    return resolve(config)


def deployable(config: DictConfig) -> StrategyLike:
    """The configured method; ConfigError if it cannot work on nodes."""
    method = participants.strategy(config, None)
    name = type(method).__name__
    if method.traits.pooled:
        raise ConfigError(f"strategy: {name} needs all data in one place; simulate it")
    if method.traits.asynchronous:
        raise ConfigError(
            f"strategy: {name} starts clients at simulated times, but nodes take real ones; simulate it"
        )
    return method


@dataclass(frozen=True)
class Node:
    """A SuperNode's own settings, from ``--node-config``.

    ``client`` (``partition-id``) is the client that the node is. ``data-path`` replaces ``data.path``. With
    ``own-data=true`` all training samples found there are this client's; otherwise the node takes its client's part of
    the configured partition of the common data set. ``state-dir`` is where client state is kept.
    """

    client: int
    data_path: str | None
    own_data: bool
    state_dir: Path
    keep_days: float = (
        30.0  # that the state of a run is kept after it was last worked for (``state.keep_days``)
    )

    @staticmethod
    def of(values: Values, num_clients: int) -> Node:
        """Read and check; ConfigError names the key and what to give ``flower-supernode``."""
        client = values.get("partition-id")
        if client is None:
            near = next((h for k in values if (h := hint(k, NODE_KEYS))), "")
            raise ConfigError(
                f"the node has no partition-id{near}; start it with --node-config 'partition-id=0'"
            )
        if isinstance(client, bool) or not isinstance(client, int) or not 0 <= client < num_clients:
            raise ConfigError(
                f"partition-id={client}: the run has {num_clients} clients, so it must be an integer from 0 to "
                f"{num_clients - 1}; restart the node with another, or the run with num_clients=..."
            )
        parts = values.get("num-partitions", num_clients)
        if parts != num_clients:
            raise ConfigError(
                f"num-partitions={parts}: the run has num_clients={num_clients}; make them equal, or leave "
                "num-partitions out"
            )
        own = values.get("own-data", False)
        if not isinstance(own, bool):
            raise ConfigError(f"own-data={own}: must be true or false")
        path = values.get("data-path")
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "fedsim"
        state = Path(str(values.get("state-dir", home))).expanduser()
        days = values.get("state.keep_days", Node.keep_days)
        if isinstance(days, bool | str) or not days > 0:
            raise ConfigError(f"state.keep_days={days}: must be a positive number of days")
        return Node(client, None if path is None else str(path), own, state, float(days))

    def localise(self, config: DictConfig) -> DictConfig:
        """Put the node's data path into ``config`` (in place)."""
        if self.data_path is not None:
            if "path" not in config.data:
                raise ConfigError(f"data-path={self.data_path}: {config.data.get('_target_')} reads no path")
            config.data.path = self.data_path
        return config


def plain_error(error: BaseException) -> str:
    """One line on an error for the other side."""
    return f"{type(error).__name__}: {error}".strip()


def own_folder(config: DictConfig) -> str:
    """Folder of a deployment's results: beside the simulation of the same settings, not in its place."""
    return str(config.dir or f"{run_dir(config)}-flower")
