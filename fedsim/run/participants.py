"""Who takes part, and how: the method, its graph of peers, attackers, devices and kinds of clients."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fedsim.config.parts import check_types, part
from fedsim.config.schema import ClientConfig
from fedsim.config.targets import check_derived
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.local.kinds import Kinds
from fedsim.run import assigning
from fedsim.run.initial import DTYPES
from fedsim.run.needs import check_models, check_parts, check_settings, check_whole, refuse_partial
from fedsim.run.samples import example
from fedsim.server.collusion import AttackLike, draw_attackers
from fedsim.server.traits import StrategyLike
from fedsim.task.task import Task

if TYPE_CHECKING:
    from fedsim.system import Clock, System
    from fedsim.topology import Topology

STRATEGY = "strategy; type strategy=NAME, or name a class that is derived from strategies.base.Strategy"


def strategy(config: DictConfig, given: Any) -> StrategyLike:
    """The configured or given strategy, with the configured aggregator unless it brings its own.

    Raises:
        ConfigError: if it is not a whole strategy, or cannot work with the other settings.
    """
    if given is None:
        check_derived("strategy", config.strategy, "traits", STRATEGY)
    built = part(config.strategy, "strategy") if given is None else given
    built = (
        _made(built) if isinstance(built, type) else copy.copy(built)
    )  # the caller's object stays as it is
    check_whole(built)
    check_settings(built, config)
    defined = ["aggregator" in vars(kind) for kind in type(built).__mro__]
    if (
        "aggregator" not in built.__dict__ and sum(defined) <= 1
    ):  # else a subclass replaced the base's default
        built.aggregator = part(config.aggregator, "aggregator")
    return built  # type: ignore[no-any-return]  # see check_whole


def _made(kind: type) -> Any:
    """An object of a class that was handed over, which has to do without options."""
    try:
        needed = [
            f"{p.name}=..."
            for p in inspect.signature(kind).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # no signature to be had
        needed = []
    if needed:
        raise ConfigError(
            f"strategy: {kind.__name__} has options without a default; hand over an object, "
            f"{kind.__name__}({', '.join(needed)})"
        )
    return kind()


def agreed(config: DictConfig, method: StrategyLike) -> Topology | None:
    """The graph of peers, once all settings are found to go together that can be told without data or model.

    Raises:
        ConfigError: for what does not, and for options of a type that their part does not take.
    """
    for key in ("model", "data", "partition", "encoder", "views", "pretrain"):
        check_types(config.get(key), key)
    graph = topology(config)
    check_parts(method, config, graph)
    built, attackers = attack(config)
    if built is not None and built.fraction > 0 and not attackers:
        raise ConfigError(
            f"attack.fraction={built.fraction}: of num_clients={config.num_clients} that is nobody; give at least "
            f"{1 / config.num_clients:g}, or leave attack out"
        )
    if built is not None and built.changes_vectors and method.traits.no_vectors:
        raise ConfigError(f"attack: {method.traits.no_vectors}")
    if config.system:
        system(config)
    return graph


def topology(config: DictConfig) -> Topology | None:
    """The configured graph of peers, drawn under the run's seed; ``None`` where one server talks to all."""
    if not config.topology:
        return None
    from fedsim.topology import Topology  # and with it networkx

    built = part(config.topology, "topology", num_peers=config.num_clients, seed=config.seed)
    if not isinstance(built, Topology):
        raise ConfigError(
            f"topology: {config.topology.get('_target_')} gave {type(built).__name__}, expected a "
            "fedsim.topology.Topology"
        )
    gone = assigning.absent(config)[0]
    return built.without(gone, str(config.topology.get("connected", "retry"))) if gone else built


def attack(config: DictConfig) -> tuple[AttackLike | None, list[int]]:
    """The configured attack and the ids of the attackers; ``None`` and nobody if all clients are honest."""
    if config.attack is None:
        return None, []
    built: AttackLike = part(config.attack, "attack")
    refuse_partial(built, AttackLike, "attack", "clients.attacks.Attack")
    return built, draw_attackers(config.seed, config.num_clients, built.fraction)


def system(config: DictConfig) -> System:
    """The configured fleet."""
    from fedsim.system import System

    built = part(config.system, "system")
    if not isinstance(built, System):
        raise ConfigError(f"system: {config.system._target_} gave {type(built).__name__}, expected a System")
    return built


def clock(config: DictConfig, task: Task, data: FederatedData, size: int) -> Clock | None:
    """The virtual clock of the configured fleet, if there is one; ``size`` is the number of parameters."""
    if not config.system:
        return None
    from fedsim.system.cost import Cost, count_flops
    from fedsim.system.start import start_clock

    dtype = DTYPES[config.dtype]

    def measure() -> Cost:
        return count_flops(task, dtype, example(data, dtype))

    copies = 3  # of the parameters while training: the model, its gradient, what was received
    memory = copies * size * dtype.itemsize / 1e6
    return start_clock(system(config), data.num_clients, config.seed, memory, measure)


def client_kinds(
    config: DictConfig, local: ClientConfig, method: StrategyLike, num_clients: int, clock: Clock | None
) -> Kinds | None:
    """The configured kinds of clients, if there are any."""
    if local.classes is None:
        return None
    found = Kinds.of(local, num_clients, config.seed, None if clock is None else clock.fleet.speed)
    check_models(found, method, config)
    return found
