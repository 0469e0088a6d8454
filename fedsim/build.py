"""From a configuration, and what a caller hands over in Python, to the parts of a run."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fedsim.attack import AttackLike, draw_attackers
from fedsim.classes import Classes
from fedsim.config import ClientConfig
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch, LocalData
from fedsim.data.longtail import local_tests
from fedsim.data.partition import from_partitioner
from fedsim.data.shards import Shards, holdout
from fedsim.errors import ConfigError, FedsimError
from fedsim.rng import key, numpy_rng
from fedsim.task import Task
from fedsim.validation import hint
from fedsim.vectors import FlatModel, Weights

if TYPE_CHECKING:
    from fedsim.system import Clock, System
    from fedsim.topology import Topology

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Pair = tuple[Any, Any]  # x, y: tensors or arrays


def part(node: Any, what: str, **given: Any) -> Any:
    """Instantiate a configuration node; ``given`` is passed where the target accepts it and the node does not set it.

    Raises:
        ConfigError: if the target cannot be found or refuses its arguments; its own ``FedsimError`` passes through.
    """
    try:
        target = instantiate(node, _convert_="all", _partial_=True)
        names = _parameters(target.func)
        missing = {k: v for k, v in given.items() if (k in names or "**" in names) and node.get(k) is None}
        deferred = node.get("_partial_", False)
        return instantiate(node, _convert_="all", **missing) if not deferred else _bind(target, missing)
    except (InstantiationException, TypeError) as e:
        chain: list[BaseException] = [e]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        ours = next((c for c in chain if isinstance(c, FedsimError)), None)
        if ours is not None:
            raise ours from None
        raise ConfigError(_refusal(str(chain[-1]), what, node)) from e


def _refusal(text: str, what: str, node: Any) -> str:
    """One line on why ``node`` cannot be built; a key its target does not know is named with the nearest it does."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        known = sorted(_parameters(get_object(node.get("_target_"))) - {"self", "**"})
        near = get_close_matches(unknown[1], known, 1, 0.6)
        hint = f"nearest is '{what}.{near[0]}'" if near else f"{what} has {', '.join(known)}"
        return f"unknown key '{what}.{unknown[1]}'; {hint}"
    return f"{what}: {node.get('_target_')} cannot be built: {text.splitlines()[0] if text else 'no reason given'}"


def dataset(config: DictConfig) -> Dataset:
    """The configured data source."""
    return part(config.data, "data", seed=config.seed)  # type: ignore[no-any-return]


def split(config: DictConfig, data: Dataset) -> FederatedData:
    """Split ``data`` over ``num_clients`` by the configured partition; the draw is keyed by the seed."""
    labels = data.train.y.numpy() if data.train.y.dim() == 1 else np.zeros(len(data.train), dtype=np.int64)
    rng = numpy_rng(config.seed, "partition")
    cut = part(config.partition, "partition", ids=data.ids)
    if hasattr(cut, "load_partition"):
        parts = from_partitioner(labels, config.num_clients, rng, partitioner=cut)
    else:
        parts = cut(labels, config.num_clients, rng)
    return held_out(config, data, Shards.of(parts))


def owned(config: DictConfig, data: Dataset, client: int) -> FederatedData:
    """All of ``data`` as the samples of one of the ``num_clients``: where clients bring their own, others have none."""
    parts = [np.empty(0, dtype=np.int64)] * config.num_clients
    parts[client] = np.arange(len(data.train), dtype=np.int64)
    return held_out(config, data, Shards.of(parts))


def given_clients(
    config: DictConfig,
    clients: Sequence[Pair],
    test: Pair | Mapping[str, Pair] | None,
    domains: Sequence[str] | None = None,
) -> FederatedData:
    """Clients handed over as ``(x, y)`` pairs: x (n_i, ...) and y (n_i, ...) with equal trailing shapes.

    ``domains`` names the domain of each client; ``test`` may then be a pair per domain.
    """
    xs = [torch.as_tensor(x) for x, _ in clients]
    ys = [torch.as_tensor(y) for _, y in clients]
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if len(x) != len(y):
            raise ConfigError(f"clients[{i}]: x has {len(x)} samples, y has {len(y)}")
        if x.shape[1:] != xs[0].shape[1:] or y.shape[1:] != ys[0].shape[1:]:
            raise ConfigError(
                f"clients[{i}]: samples of shape {tuple(x.shape[1:])}, client 0 has {tuple(xs[0].shape[1:])}"
            )
    sizes = [len(x) for x in xs]
    ends = np.cumsum([0] + sizes).astype(np.int64)
    tests = dict(test) if isinstance(test, Mapping) else {} if test is None else {"": test}
    names = tuple(sorted({*(domains or ()), *(tests if isinstance(test, Mapping) else ())}))
    held = None
    if tests:
        held = Samples(*(torch.cat([torch.as_tensor(pair[i]) for pair in tests.values()]) for i in (0, 1)))
    groups = {"train": {"domain": _codes(names, domains or (), sizes)}} if names else {}
    if isinstance(test, Mapping):
        groups["test"] = {"domain": _codes(names, list(tests), [len(y) for _, y in tests.values()])}
    y = torch.cat(ys)
    kinds = {"groups": groups, "group_names": {"domain": names}} if names and domains else {}
    seen = y if held is None or held.y.dim() != 1 or y.dim() != 1 else torch.cat([y, held.y.to(y)])
    data = Dataset(Samples(torch.cat(xs), y), held, classes=_classes(seen), **kinds)  # type: ignore[arg-type]
    return held_out(config, data, Shards(np.arange(ends[-1], dtype=np.int64), ends))


def _codes(names: Sequence[str], values: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    return np.repeat(np.array([names.index(v) for v in values], dtype=np.int64), sizes)


def initialised(model: nn.Module, initial: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` holding ``initial``: parameters, frozen ones too, and statistics.

    Raises:
        ConfigError: if a tensor is missing, misshapen or unknown. Only counters may be missing.
    """
    out = copy.deepcopy(model).to(dtype)
    wanted = out.state_dict()
    for name in initial:
        if name not in wanted:
            raise ConfigError(f"initial: the model has no '{name}'{hint(name, wanted)}")
    for name, value in wanted.items():
        if name not in initial:
            if value.is_floating_point():
                raise ConfigError(f"initial: '{name}' is missing; given: {', '.join(initial) or 'nothing'}")
        elif tuple(value.shape) != tuple(torch.as_tensor(initial[name]).shape):
            shape = tuple(torch.as_tensor(initial[name]).shape)
            raise ConfigError(f"initial: '{name}' has shape {shape}, expected {tuple(value.shape)}")
    out.load_state_dict({k: torch.as_tensor(v) for k, v in initial.items()}, strict=False)
    return out


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
    return built


def fresh(config: DictConfig, data: Dataset, given: nn.Module | Callable[[], nn.Module] | None) -> Any:
    """``(peer) -> Weights``: another draw of the initial model for every peer, keyed by the seed and the peer."""
    dtype = DTYPES[config.dtype]

    def draw(peer: int) -> Weights:
        drawn = _drawn_again(given, config.seed, peer) if isinstance(given, nn.Module) else None
        return FlatModel(drawn or model(config, data, given, peer), dtype).weights

    return draw


def _drawn_again(module: nn.Module, seed: int, peer: int) -> nn.Module:
    """A copy whose layers draw their weights anew, as torch's own layers can."""
    out = copy.deepcopy(module)
    covered: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "model", peer) >> 1)
        for layer in out.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
                covered |= {id(p) for p in layer.parameters(recurse=False)}
    for name, p in out.named_parameters():
        if id(p) not in covered:
            raise ConfigError(
                f"model: a fresh start per peer was asked for, but '{name}' lies in a layer without "
                "reset_parameters(); hand over a function that builds the model, or type strategy.init=shared"
            )
    return out


def model(
    config: DictConfig,
    data: Dataset,
    given: nn.Module | Callable[[], nn.Module] | None,
    *draw: int,
) -> nn.Module:
    """The initial model; a configured or given factory runs under a generator keyed by the seed and ``draw``."""
    if isinstance(given, nn.Module):
        return given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "model", *draw) >> 1)
        if given is not None:
            return given()
        shape = {"input_shape": data.input_shape, "num_classes": data.num_classes}
        built = part(config.model, "model", **shape)
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"model: {config.model.get('_target_')} gave {type(built).__name__}, expected an nn.Module"
        )
    return built


def strategy(config: DictConfig, given: Any) -> Any:
    """The configured or given strategy, with the configured aggregator unless it brings its own."""
    built = part(config.strategy, "strategy") if given is None else given
    built = built() if isinstance(built, type) else copy.copy(built)  # the caller's object stays as it is
    for name in ("init", "round", "models", "client"):
        if not hasattr(built, name):
            raise ConfigError(
                f"strategy: {type(built).__name__} has no '{name}'; derive it from strategies.base.Strategy"
            )
    peers = getattr(built, "peers", False)
    if bool(config.topology) != peers:
        raise ConfigError(
            "topology: this method's peers need a graph; type topology=ring, random_regular or another"
            if peers
            else f"topology: {type(built).__name__} talks through a server; leave topology out, or type strategy=gossip"
        )
    defined = ["aggregator" in vars(kind) for kind in type(built).__mro__]
    if (
        "aggregator" not in built.__dict__ and sum(defined) <= 1
    ):  # else a subclass replaced the base's default
        built.aggregator = part(config.aggregator, "aggregator")
    return built


def attack(config: DictConfig) -> tuple[AttackLike | None, list[int]]:
    """The configured attack and the ids of the attackers; ``None`` and nobody if all clients are honest."""
    if config.attack is None:
        return None, []
    built: AttackLike = part(config.attack, "attack")
    return built, draw_attackers(config.seed, config.num_clients, built.fraction)


def system(config: DictConfig) -> System:
    """The configured fleet."""
    from fedsim.system import System

    built = part(config.system, "system")
    if not isinstance(built, System):
        raise ConfigError(f"system: {config.system._target_} gave {type(built).__name__}, expected a System")
    return built


def clock(config: DictConfig, task: Task, data: FederatedData, dim: int) -> Clock | None:
    """The virtual clock of the configured fleet, if there is one; ``dim`` is the number of parameters."""
    if not config.system:
        return None
    from fedsim.system.cost import Cost, count_flops

    dtype = DTYPES[config.dtype]

    def measure() -> Cost:
        batch = example(data, dtype)
        return count_flops(copy.deepcopy(task.model).to(dtype), batch.x, batch.y, task.loss)

    copies = 3  # of the parameters while training: the model, its gradient, what was received
    return system(config).start(data.num_clients, config.seed, copies * dim * dtype.itemsize / 1e6, measure)


def example(data: FederatedData, dtype: torch.dtype) -> Batch:
    """Two training samples as the model gets them, for whoever needs shapes."""
    train = data.dataset.train
    rows = torch.arange(len(train))
    return LocalData(train, rows, dtype, data.dataset.normalize).read(rows[:2])


def classes(
    config: DictConfig, local: ClientConfig, method: Any, num_clients: int, clock: Clock | None
) -> Classes | None:
    """The configured kinds of clients, if there are any."""
    if local.classes is None:
        return None
    found = Classes.of(local, num_clients, config.seed, None if clock is None else clock.fleet.speed)
    if set(found.widths) != {1.0} and not getattr(method, "widths", False):
        raise ConfigError(
            "client.classes: a width needs a method that trains parts of the model; strategy=heterofl"
        )
    return found


def typed(node: Any, kind: type) -> Any:
    """A plain instance of a configuration dataclass (fast attributes, picklable)."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = {str(k): v for k, v in plain.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    for name, kinds in get_type_hints(kind).items():
        inner = next((t for t in (kinds, *get_args(kinds)) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None and isinstance(values.get(name), Mapping):
            values[name] = typed(values[name], inner)
    return kind(**values)


def held_out(config: DictConfig, data: Dataset, shards: Shards) -> FederatedData:
    """``data`` dealt out by ``shards``, with what each client is measured on set aside as configured."""
    fraction, own = config.evaluation.holdout, config.evaluation.clients_on == "domain"
    if own and config.evaluation.clients_every and data.domain("test") is None:
        raise ConfigError(
            "evaluation.clients_on=domain: this data set has no test samples with domains; type holdout"
        )
    if config.evaluation.local_test:
        return FederatedData(data, shards, local_test=_local_tests(config.seed, data, shards))
    if not fraction:
        return FederatedData(data, shards, own_domain=own)
    train, held = holdout(shards, fraction, lambda i: numpy_rng(config.seed, "holdout", 0, i))
    return FederatedData(data, train, held, own_domain=own)


def classes_to_count(config: DictConfig, data: Dataset) -> int:
    """The number of classes if they are to be measured one by one, else 0."""
    if not config.evaluation.by_class:
        return 0
    if not data.num_classes or data.train.y.dim() != 1:
        raise ConfigError("evaluation.by_class=true: this data set has no class labels; leave it false")
    return data.num_classes


def _local_tests(seed: int, data: Dataset, shards: Shards) -> Shards:
    if data.test is None or not data.num_classes or data.test.y.dim() != 1:
        raise ConfigError(
            "evaluation.local_test=true: needs a test set with class labels, which this data set has not; "
            "give evaluation.holdout=0.2 instead"
        )
    counts = shards.counts(data.train.y.numpy(), data.num_classes)
    return local_tests(counts, data.test.y.numpy(), lambda i: numpy_rng(seed, "local test", 0, i))


def _classes(y: Tensor) -> tuple[str, ...]:
    labels = y.dim() == 1 and not y.is_floating_point() and len(y)
    return tuple(map(str, range(int(y.max()) + 1))) if labels else ()


def _bind(target: partial[Any], more: dict[str, Any]) -> Any:
    """A plain partial: Hydra's own kind would hide the function from whoever looks for it."""
    return partial(target.func, *target.args, **{**target.keywords, **more})


def _parameters(function: Any) -> set[str]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in found}
