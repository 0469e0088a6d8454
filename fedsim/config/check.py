"""Refuse impossible settings before anything is started, by key, value and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.moved import now, targets
from fedsim.config.names import check_names
from fedsim.config.parts import OWN, hints_of
from fedsim.config.schema import ENGINES, EngineConfig, RunConfig
from fedsim.errors import ConfigError, check_choice, hint

CHOICES: Mapping[str, tuple[str, ...]] = {
    "audit.kind": ("random", "mislabelled", "duplicate"),
    "audit.level": ("sample", "client"),
    "resume": ("auto", "never"),
    "dtype": ("float32", "float64"),
    "participation": ("fixed", "bernoulli"),
    "buffers": ("average", "local", "all_local"),
    "client.autocast": ("bfloat16", "float16"),
    "client.classes_by": ("random", "speed"),
    "client.clip": ("direction", "loss", "full"),
    "client.clip_pull": ("whole", "split"),
    "engine.name": tuple(ENGINES),
    "evaluation.clients_on": ("holdout", "domain"),
    "evaluation.local_unseen": ("all", "multi"),
    "exclude_fill": ("substitute", "shrink"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.vectorize": ("auto", "on", "off"),
    "engine.lost_state": ("restart", "stop"),
    "failures.policy": ("stop", "skip"),
    "failures.nonfinite": ("skip", "stop"),
    "failures.thin_round": ("skip", "stop"),
    "objective.on": ("test", "val", "clients", "clients_val"),
    "objective.direction": ("auto", "max", "min"),
    "objective.clients": ("mean", "weighted", "worst_tenth"),
    "tracker.console.mode": ("auto", "rich", "plain", "quiet"),
    "tracker.console.shows": ("all", "validation"),
    "tracker.wandb.mode": ("disabled", "auto", "offline", "online"),
}

_Check = tuple[Callable[[Any], bool], str]
_POSITIVE: _Check = (lambda v: v > 0, "must be positive")
_NONNEGATIVE: _Check = (lambda v: v >= 0, "must not be negative")
_AT_LEAST_1: _Check = (lambda v: v >= 1, "must be at least 1")

RANGES: Mapping[str, _Check] = {
    "rounds": _AT_LEAST_1,
    "seed": (lambda v: 0 <= v < 2**63, "must be between 0 and 2**63 - 1"),
    "audit.canaries": _NONNEGATIVE,
    "num_clients": _AT_LEAST_1,
    "client.lr": _POSITIVE,
    "client.lr_decay": (lambda v: 0 < v <= 1, "must be in (0, 1]: it multiplies the rate after each round"),
    "client.epochs": _AT_LEAST_1,
    "client.min_epochs": _AT_LEAST_1,
    "client.steps": _AT_LEAST_1,
    "client.batch_size": _AT_LEAST_1,
    "client.accumulate": _AT_LEAST_1,
    "client.momentum": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "client.adam.beta1": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "client.adam.beta2": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "client.adam.eps": _POSITIVE,
    "client.weight_decay": _NONNEGATIVE,
    "client.clip_norm": _POSITIVE,
    "data.imbalance": _POSITIVE,
    "data.largest": _AT_LEAST_1,
    "partition.alpha": _POSITIVE,
    "embed.batch_size": _AT_LEAST_1,
    "attack.fraction": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "engine.workers": _NONNEGATIVE,
    "engine.threads": _AT_LEAST_1,
    "engine.chunks": _NONNEGATIVE,
    "engine.lanes": _NONNEGATIVE,
    "engine.store_mb": _NONNEGATIVE,
    "engine.timeout": _POSITIVE,
    "engine.start": _POSITIVE,
    "engine.wait_for": _NONNEGATIVE,
    "engine.deadline": _POSITIVE,
    "engine.poll": _POSITIVE,
    "engine.most_samples": _AT_LEAST_1,
    "evaluation.every": _AT_LEAST_1,
    "evaluation.batch_size": _AT_LEAST_1,
    "evaluation.clients_every": _NONNEGATIVE,
    "evaluation.client_validation": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "evaluation.held_out_clients": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "evaluation.held_out_steps": _NONNEGATIVE,
    "evaluation.holdout": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "evaluation.validation": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "evaluation.target": (lambda v: 0 <= v <= 1, "must be in [0, 1], as accuracies are"),
    "failures.retries": _NONNEGATIVE,
    "checkpoint.every": _NONNEGATIVE,
    "checkpoint.memory_mb": _NONNEGATIVE,
}

# Of fedsim's own parts, where they have such an option; all others are checked by the parts themselves
PART_RANGES: Mapping[str, _Check] = {
    "data.alpha": _NONNEGATIVE,
    "data.beta": _NONNEGATIVE,
    "data.num_test": _NONNEGATIVE,
    "data.seed": _NONNEGATIVE,
    "encoder.grid": _AT_LEAST_1,
    "encoder.seed": _NONNEGATIVE,
    "encoder.width": _AT_LEAST_1,
    "model.channels": _AT_LEAST_1,
    "model.embedding": _AT_LEAST_1,
    "model.groups": _AT_LEAST_1,
    "model.hidden": _AT_LEAST_1,
    "model.layers": _AT_LEAST_1,
    "model.model.hidden": _AT_LEAST_1,
    "partition.min_samples": _NONNEGATIVE,
    "partition.per_class": _NONNEGATIVE,
    "strategy.lr_decay": (lambda v: 0 < v <= 1, "must be in (0, 1]: it multiplies the rate"),
    "strategy.seed": _NONNEGATIVE,
    "strategy.sse.seed": _NONNEGATIVE,
    "system.devices.compute_watts": _NONNEGATIVE,
    "system.devices.radio_watts": _NONNEGATIVE,
}

IF_CHOSEN = {  # groups that are none unless an option is named
    "privacy": "client, local, record",
    "compression": "top_k, random_k, qsgd, sign, rotate, low_rank, nonzero",
    "secagg": "ring, masks",
    "topology": "ring, torus, complete and others",
    "system": "lognormal, phones, table",
}
NEEDS_TARGET = (
    "strategy",
    "aggregator",
    "sampling",
    "attack",
)  # parts of a run that are named by class or function


def validate(config: DictConfig) -> None:
    """Check every setting that fedsim itself reads; a method's own settings are checked by its constructor.

    Raises:
        ConfigError: one line for the first impossible setting, e.g.
            ``clients_per_round=30: must be between 1 and num_clients (20)``.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _refuse_unknown(config, RunConfig, "")
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key}: has no value; add {key}=VALUE")
    for key, target in targets(values):
        if (place := now(target)) is not None:
            raise ConfigError(f"{key}={target}: this is now {place}; type {key}={place}")
    for key, allowed in _everywhere(CHOICES):
        if (value := _at(values, key)) is not None:
            check_choice(key, value, allowed)
    for key, (possible, text) in _everywhere(RANGES):
        _check_range(key, _at(values, key), possible, text)
    if not re.fullmatch(r"last|all|every:[1-9]\d*", str(config.checkpoint.keep)):
        raise ConfigError(
            f"checkpoint.keep={config.checkpoint.keep}: choose last, all or every:N, as in every:10"
        )
    for key, (possible, text) in PART_RANGES.items():
        target = str(_at(values, f"{key.partition('.')[0]}._target_"))
        value = _at(values, key)
        if target.partition(".")[0] in OWN and not isinstance(value, dict):
            for one in value if isinstance(value, list) else [value]:
                _check_range(key, one, possible, text)
    for key in (*NEEDS_TARGET, *(name for name in IF_CHOSEN if config.get(name))):
        node = config.get(key)
        if key in IF_CHOSEN and isinstance(node, DictConfig) and "_target_" not in node:
            given = ", ".join(f"{key}.{name!s}" for name in node)
            raise ConfigError(
                f"{given}: nothing reads it while {key} is none; type {key}=..., one of {IF_CHOSEN[key]}"
            )
        check_target(key, node)
    check_names(config)
    _check_relations(config)


def _at(values: Any, key: str) -> Any:
    """The value of a dotted key; ``None`` where there is no such key."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _everywhere(rules: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rules by key; those of group ``client`` also hold where pretraining has an option of it."""
    for key, rule in rules.items():
        yield key, rule
        if key.startswith("client."):
            yield f"pretrain.training.{key.removeprefix('client.')}", rule


def _refuse_unknown(config: DictConfig, schema: Any, prefix: str) -> None:
    """Refuse keys that ``+key=value`` or code added: nothing would ever read them."""
    types = hints_of(schema)
    known = [field.name for field in dataclasses.fields(schema)]
    for name in known:
        if name not in config:
            raise ConfigError(f"{prefix}{name}: has no value; add {prefix}{name}=VALUE")
    for name in map(str, config):
        if name not in known:
            raise ConfigError(f"unknown key {prefix + name!r}{hint(name, known, prefix)}")
        child = None if OmegaConf.is_missing(config, name) else config[name]
        inner = (
            ENGINES.get(child.get("name"), EngineConfig)
            if prefix + name == "engine" and child
            else types[name]
        )
        if isinstance(child, DictConfig) and dataclasses.is_dataclass(inner):
            _refuse_unknown(child, inner, f"{prefix}{name}.")


def _check_range(key: str, value: Any, possible: Callable[[Any], bool], text: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value}: must be a number")
    if not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be finite")
    if not possible(value):
        raise ConfigError(f"{key}={value}: {text}")


def check_target(key: str, node: Any) -> None:
    """Refuse a part that names no class or function, or one of a module that does not exist."""
    if node is None:
        return  # given as a Python object instead
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or "." not in target:
        near = f", but {target!r}" if target else ""
        raise ConfigError(f"{key}: has no _target_, the dotted path of its class (my_module.MyClass){near}")
    _check_module(key, target)


def _check_module(key: str, target: str) -> None:
    """Refuse a ``_target_`` whose module does not exist, importing no more than the packages around it."""
    parts = target.split(".")
    for depth in range(1, len(parts)):
        name, inside = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
        try:
            found = name in sys.modules or find_spec(name) is not None
        except ImportError:  # of the package itself: its constructor will say why
            return
        if not found:
            around = sys.modules.get(inside)
            if around is not None and hasattr(around, parts[depth - 1]):
                return  # a class, not a module
            modules = [m.name for m in iter_modules(around.__path__)] if around is not None else []
            near = hint(parts[depth - 1], modules, f"{inside}.")
            raise ConfigError(f"{key}._target_={target}: there is no module {name!r}{near}")


def _check_relations(config: DictConfig) -> None:
    if not 1 <= config.clients_per_round <= config.num_clients:
        given, most = config.clients_per_round, config.num_clients
        raise ConfigError(f"clients_per_round={given}: must be between 1 and num_clients ({most})")
    if config.participation != "fixed" and not str(config.sampling.get("_target_")).endswith(".Uniform"):
        raise ConfigError(f"participation={config.participation}: only sampling=uniform can do that")
    least, most = config.client.min_epochs, config.client.epochs
    if least is not None and least > most:
        raise ConfigError(f"client.min_epochs={least}: must not exceed client.epochs ({most})")
    if config.client.adam is not None and config.client.momentum:
        raise ConfigError(
            f"client.momentum={config.client.momentum}: Adam has its own; type client.adam.beta1"
        )
    if config.client.nesterov and not config.client.momentum:
        raise ConfigError("client.nesterov=true: needs momentum; add client.momentum=0.9")
    if config.evaluation.stop_at_target and config.evaluation.target is None:
        raise ConfigError("evaluation.stop_at_target=true: needs evaluation.target, an accuracy in [0, 1]")
    for part in ("encoder", "pretrain"):
        if config[part]:
            check_target(part, config[part])
    if not re.fullmatch(r"last|best_val|mean:0*[1-9]\d*", str(config.objective.at)):
        raise ConfigError(f"objective.at={config.objective.at}: must be last, mean:K (K from 1) or best_val")
    plan = config.evaluation
    if plan.holdout and plan.local_test:
        raise ConfigError("evaluation.local_test=true: not together with evaluation.holdout; choose one")
    own = plan.holdout or plan.local_test or plan.clients_on == "domain"
    if plan.clients_every and not (own or plan.client_validation or plan.held_out_clients):
        raise ConfigError(
            "evaluation.clients_every: clients are measured on test sets of their own; give evaluation.holdout=0.2, "
            "evaluation.local_test=true, or evaluation.clients_on=domain for a data set with domains"
        )
    if config.engine.name == "serial" and config.engine.workers != 1:
        raise ConfigError(
            f"engine.workers={config.engine.workers}: must be 1 with engine=serial; use engine=ray"
        )
