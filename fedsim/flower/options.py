"""Settings of a deployment: Hydra overrides in Flower's run configuration, and what a node says of itself."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.config.allowed import check_allowed, check_words, granted, listed
from fedsim.config.check import validate
from fedsim.config.compose import compose, plain
from fedsim.errors import ConfigError, hint
from fedsim.exchange.payload import Outcome
from fedsim.flower.nodesettings import NODE_KEYS, Values, check_settings, clients_of
from fedsim.run import participants
from fedsim.run.key import run_dir
from fedsim.run.resolve import resolve
from fedsim.server.traits import StrategyLike
from fedsim.tracking.prometheus import add

log = logging.getLogger(__name__)

# Where libraries keep what they fetch, by variable; of a node it lies in ``<state-dir>/cache``
CACHES = {"HF_HOME": "huggingface", "TORCH_HOME": "torch", "XDG_CACHE_HOME": "other"}


def configuration(run_config: Values) -> DictConfig:
    """The configuration that ``overrides`` of the run configuration stand for, on the engine ``flower``.

    Raises:
        ConfigError: for anything that ``fedsim`` would refuse, and for settings that a deployment cannot have.
    """
    return deployed(words(run_config))


def at_node(
    run_config: Values, node_config: Values, client: int | None = None
) -> tuple[DictConfig, list[Node]]:
    """The same at a node, which does not trust who submitted: all keys are checked before anything is built.

    The node is returned as each of its clients; as ``client`` alone, if it is one of them.

    Raises:
        ConfigError: also for what may not be built here, and where data of the node's own might leave it.
    """
    check_words(overrides := words(run_config))
    with granted(listed(str(node_config.get("allow", "")), "allow")):
        config = deployed(overrides, check_allowed)
        node, *others = (Node.of(node_config, config.num_clients, c) for c in clients_of(node_config))
        if found := next(_caches(plain(config)), None):
            raise ConfigError(f"{found}: a node writes under its state-dir only; leave it out")
        if node.own_data:
            keeps_samples(participants.strategy(config, None))
    mine = [n for n in (node, *others) if n.client == client]
    return node.localise(config), mine or [node, *others]


def _caches(node: Any, key: str = "") -> Iterator[str]:
    """Settings of data sources, at any depth, that say where to write."""
    inside = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inside:
        where = f"{key}.{name}" if key else str(name)
        if name == "cache" and value is not None:
            yield f"{where}={value}"
        yield from _caches(value, where)


def keeps_samples(method: StrategyLike) -> None:
    """Refuse a method by which, as it is set, samples themselves may leave a client that owns them."""
    if method.traits.exposes:
        raise ConfigError(f"own-data: {type(method).__name__} would send samples: {method.traits.exposes}")


def words(run_config: Values) -> list[str]:
    """The overrides of a run, one by one.

    Raises:
        ConfigError: for quotes that do not close.
    """
    try:
        return shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise ConfigError(
            f"overrides={run_config['overrides']!r}: {error}; write them as on a command line"
        ) from None


def deployed(overrides: list[str], check: Callable[[DictConfig], None] | None = None) -> DictConfig:
    """``overrides`` composed for a deployment; ``check`` sees them before anything else does."""
    for o in overrides:
        if o.lstrip("+").startswith("engine=") and o != "engine=flower":
            raise ConfigError(f"{o}: clients of a deployment are computed at their nodes; leave it out")
    config = compose(["checkpoint.every=1", *overrides, "engine=flower"])
    if check is not None:
        check(config)
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
    resolve(config)
    if config.engine.wait_for > config.num_clients:
        raise ConfigError(
            f"engine.wait_for={config.engine.wait_for}: the run has {config.num_clients} clients; 0 waits for all"
        )
    if any("model" in row for row in config.client.classes or () if isinstance(row, Mapping)):
        raise ConfigError(
            "client.classes: nodes agree on one model before round 1, so no class of a deployment can have a `model` "
            "of its own; simulate it, or leave `model` out of the classes"
        )
    return config


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

    ``client`` (``partition-id``, or one of ``clients``) is the client that the node is. ``data-path`` replaces
    ``data.path``. With ``own-data=true`` all training samples found there are this client's; otherwise the node takes
    its client's part of the configured partition of the common data set. ``state-dir`` is where client state is kept,
    and all else that is written. ``allow`` names modules and classes of the node's own that settings may build
    (``fedsim.config.allowed``). ``metrics`` is a text file of counts for dashboards
    (``fedsim.tracking.prometheus``).
    """

    client: int
    data_path: str | None
    own_data: bool
    state_dir: Path
    keep_days: float = (
        30.0  # that the state of a run is kept after it was last worked for (``state.keep_days``)
    )
    allow: tuple[str, ...] = ()
    metrics: Path | None = None

    @staticmethod
    def of(values: Values, num_clients: int, client: Any) -> Node:
        """As ``client``, read and checked; ConfigError names the key and what to give ``flower-supernode``."""
        if client is None:
            near = next((h for k in values if (h := hint(k, NODE_KEYS))), "")
            raise ConfigError(
                f"the node has no partition-id{near}; start it with --node-config 'partition-id=0'"
            )
        check_settings(values)
        if isinstance(client, bool) or not isinstance(client, int) or not 0 <= client < num_clients:
            key = "clients" if "clients" in values else "partition-id"
            raise ConfigError(
                f"{key}={client!r}: the run has {num_clients} clients, so it must be an integer from 0 to "
                f"{num_clients - 1}; restart the node with another, or the run with num_clients=..."
            )
        parts = values.get("num-partitions", num_clients)
        if parts != num_clients:
            raise ConfigError(
                f"num-partitions={parts!r}: the run has num_clients={num_clients}; make them equal, or leave "
                "num-partitions out"
            )
        path = values.get("data-path")
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "fedsim"
        state = Path(str(values.get("state-dir", home))).expanduser()
        days = values.get("state.keep_days", Node.keep_days)
        own = values.get("own-data", False)
        allow = listed(str(values.get("allow", "")), "allow")
        metrics = Path(str(values["metrics"])).expanduser() if "metrics" in values else None
        return Node(
            client, None if path is None else str(path), bool(own), state, float(days), allow, metrics
        )

    def localise(self, config: DictConfig) -> DictConfig:
        """Put the node's data path into ``config`` (in place)."""
        if self.data_path is not None:
            if "path" not in config.data:
                raise ConfigError(f"data-path={self.data_path}: {config.data.get('_target_')} reads no path")
            config.data.path = self.data_path
        return config

    def count(self, outcome: Outcome) -> None:
        """Add what became of a message to the file of counts; without one, or if it cannot be written, nothing."""
        if self.metrics is None:
            return
        mine = (("client", str(self.client)),)
        counts = [("fedsim_node_messages_total", (*mine, ("outcome", outcome.kind)), 1.0)]
        for way, size in (("up", outcome.bytes_up), ("down", outcome.bytes_down)):
            counts.append(("fedsim_node_bytes_total", (*mine, ("direction", way)), float(size)))
        try:
            add(self.metrics, counts, [("fedsim_node_last_message_timestamp_seconds", mine)])
        except (OSError, ValueError) as error:  # no rights, or another program's file, which is no text
            log.warning("metrics=%s cannot be written: %s", self.metrics, error)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """What is built within may be of this node's own ``allow``, and caches lie where it keeps everything."""
        before = {name: os.environ.get(name) for name in CACHES}
        missing = {n: str(self.state_dir / "cache" / f) for n, f in CACHES.items() if before[n] is None}
        os.environ.update(missing)
        try:
            with granted(self.allow):
                yield
        finally:
            for name in missing:
                os.environ.pop(name, None)


def plain_error(error: BaseException) -> str:
    """One line on an error for the other side."""
    return f"{type(error).__name__}: {error}".strip()


def own_folder(config: DictConfig) -> str:
    """Folder of a deployment's results: beside the simulation of the same settings, not in its place."""
    return str(config.dir or f"{run_dir(config)}-flower")
