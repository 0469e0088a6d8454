"""Settings that were typed and have no effect beside the others: refused where they contradict them, else said."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fedsim.errors import ConfigError
from fedsim.server.traits import Traits

log = logging.getLogger(__name__)

_NOT_SET: Sequence[
    tuple[str, str, str]
] = (  # typed, without effect while this is null, 0 or false, what to add
    ("client.clip", "client.clip_norm", "client.clip_norm=10"),
    ("client.classes_by", "client.classes", "client.classes=[...]"),
    ("embed", "encoder", "encoder=..."),
    ("audit.kind", "audit.canaries", "audit.canaries=100"),
    ("audit.level", "audit.canaries", "audit.canaries=100"),
    ("audit.guesses", "audit.canaries", "audit.canaries=100"),
    ("evaluation.held_out_steps", "evaluation.held_out_clients", "evaluation.held_out_clients=0.2"),
    ("evaluation.clients_on", "evaluation.clients_every", "evaluation.clients_every=1"),
    ("evaluation.fairness", "evaluation.clients_every", "evaluation.clients_every=1"),
    ("system.battery", "system.devices.battery", "system.devices.battery=WH"),
    ("system.devices.charge", "system.devices.battery", "system.devices.battery=WH"),
)

_READ_BY: Sequence[tuple[str, str, Sequence[str]]] = (  # typed, what reads it, with which values
    ("privacy.adaptive", "privacy.clip", ("adaptive",)),
    ("privacy.least", "privacy.where", ("distributed",)),
    ("privacy.band", "privacy.mechanism", ("banded", "tree")),
    ("privacy.micro", "privacy.level", ("record",)),
)


def refuse_contradictions(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse epochs and steps typed on one command line: only one says how long clients train.

    Where the steps are a preset of the method, or in Python, where lists of settings are put together, that is said
    and no more: sweeps give one setting to many methods.

    Raises:
        ConfigError: naming both.
    """
    keys = typed_keys(overrides)
    for line in _epochs(config, keys) if "client.steps" in keys else ():
        raise ConfigError(line)


def say(config: DictConfig, overrides: Sequence[str], handed: Mapping[str, Any] | None = None) -> None:
    """A line for every setting among ``overrides`` that nothing will read, beside what was ``handed`` over by name."""
    keys = typed_keys(overrides)
    present = {k: v for k, v in (handed or {}).items() if v is not None}
    lines = [*_epochs(config, keys), *without_effect(config, keys, present.get("strategy"))]
    for line in (*lines, *_replaced(config, keys, present)):
        log.warning("%s", line)


_REPLACED = {
    "strategy": ("strategy",),
    "model": ("model",),
    "clients": ("data", "partition"),
    "data": ("data",),
}
OF_OPTIMISERS = (
    "lr", "epochs", "min_epochs", "steps", "accumulate", "momentum", "nesterov", "adam", "weight_decay", "decoupled",
    "groups", "schedule", "clip_norm", "clip", "clip_pull",
)  # fmt: skip
_STILL_READ = ("model.head", "data.labelled", "data.server", "strategy.horizon")  # whoever brings the rest


def _replaced(config: DictConfig, keys: Sequence[str], handed: Mapping[str, Any]) -> Iterator[str]:
    """Settings of parts in whose place others were handed over."""
    for name, parts in _REPLACED.items():
        for key in keys if name in handed else ():
            kept = any(key == k or key.startswith(f"{k}.") for k in _STILL_READ)
            if key.partition(".")[0] in parts and not kept:
                yield f"{key}: without effect; {name}=... was handed over in its place: leave one of them out"
    count = len(handed["clients"]) if hasattr(handed.get("clients"), "__len__") else config.num_clients
    if "num_clients" in keys and config.num_clients != count:
        yield f"num_clients={config.num_clients}: without effect; clients=... handed over are {count}"


def limit_cohort(config: DictConfig, overrides: Sequence[str], count: int | None = None) -> str:
    """Let all clients take part where there are fewer than the default of ``clients_per_round`` (in place).

    A number that was typed, or that an experiment brings, stays as it is, to be refused if it is too large. ``count``:
    of the clients handed over.

    Returns:
        What is to be said of it; empty if nothing changed.
    """
    count = config.num_clients if count is None else count
    default = config.clients_per_round
    chosen = {"clients_per_round", "experiment"} & set(typed_keys(overrides))
    if chosen or not isinstance(count, int) or not 1 <= count < default:
        return ""
    config.clients_per_round = count
    return f"clients_per_round={count}: all clients, since there are fewer than its default, {default}"


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that overrides set, dotted, those of options chosen among them."""
    keys = (o.partition("=")[0].lstrip("+").partition("@")[0] for o in overrides if "=" in o)
    return list(dict.fromkeys(key.replace("/", ".") for key in keys))


def without_effect(config: DictConfig, keys: Sequence[str], strategy: Any = None) -> Iterator[str]:
    """``strategy.b=7: without effect; strategy.staleness=polynomial does not read it``; ``strategy``: one handed over
    in the place of the configured."""
    for typed, other, add in _NOT_SET:
        for key in keys:
            if (key == typed or key.startswith(f"{typed}.")) and not OmegaConf.select(config, other):
                yield f"{_shown(config, key)}: without effect; add {add}"
    yield from _of_release(config, keys)
    if "engine.tf32" in keys and config.engine.tf32 and _on_cpu(config):
        yield "engine.tf32=true: without effect on a CPU; leave it out"
    if strategy is not None:
        try:
            traits = strategy.traits
        except AttributeError:  # what it lacks is said when it is looked at
            return
        if isinstance(traits, Traits):
            yield from _of_method(config, keys, traits)
        return
    node: Any = config.get("strategy")
    prefix, first = "strategy", True
    while isinstance(node, DictConfig):
        traits = _traits(node)
        if traits is not None and first:
            yield from _of_method(config, keys, traits)
        for name, (other, values) in (traits.unread if traits else {}).items():
            if f"{prefix}.{name}" in keys and node.get(other) in values:
                reason = f"{prefix}.{other}={'null' if node.get(other) is None else node.get(other)}"
                yield f"{_shown(config, f'{prefix}.{name}')}: without effect; {reason} does not read it"
        node, prefix, first = node.get("base"), f"{prefix}.base", False


def _of_release(config: DictConfig, keys: Sequence[str]) -> Iterator[str]:
    """What neither privacy nor secure sums read as they are set."""
    for typed, other, values in _READ_BY:
        value = OmegaConf.select(config, other)
        for key in keys if value is not None and value not in values else ():
            if key == typed or key.startswith(f"{typed}."):
                yield f"{_shown(config, key)}: without effect; {other}={value} does not read it"
    level = OmegaConf.select(config, "privacy.level")
    if "secagg.reach" in keys and level == "client" and OmegaConf.select(config, "secagg"):
        yield f"{_shown(config, 'secagg.reach')}: without effect; under privacy=client the ring reaches privacy.clip"


def _on_cpu(config: DictConfig) -> bool:
    import torch

    return config.engine.device == "cpu" or not (config.engine.name == "flower" or torch.cuda.is_available())


def _epochs(config: DictConfig, keys: Sequence[str]) -> Iterator[str]:
    steps = config.client.steps
    for key in ("client.epochs", "client.min_epochs"):
        value = OmegaConf.select(config, key)
        if steps is not None and value is not None and key in keys:
            yield (
                f"{key}={value}: without effect, since client.steps={steps} says how long clients train; leave one of "
                "them out (client.steps=null turns steps off)"
            )


def _of_method(config: DictConfig, keys: Sequence[str], traits: Any) -> Iterator[str]:
    """What a method of this kind does not read."""
    reasons: dict[str, str] = {}
    if traits.asynchronous and not traits.peers:
        why = "this method starts clients by itself; type strategy.concurrency"
        reasons |= {"clients_per_round": why, "participation": why, "exclude_fill": why}
    if traits.asynchronous and traits.peers:
        why = "peers start by themselves; type strategy.online"
        reasons |= {"clients_per_round": why, "participation": why, "sampling": why}
    if traits.pooled:
        why = "all samples lie in one place"
        reasons |= {"clients_per_round": why, "participation": why, "sampling": why}
    if traits.one_step:
        why = "clients send one gradient, not a step along it; type strategy.server_lr, strategy.momentum"
        reasons |= {"client.lr": why, "client.lr_decay": why, "client.momentum": why}
        reasons |= {"client.round_schedule": why}
    if traits.no_optimiser:
        reasons |= {f"client.{key}": traits.no_optimiser for key in OF_OPTIMISERS}
    if traits.client_by_client:
        reasons["engine.chunks"] = "this method's sums are taken client by client"
    if traits.buffers is not None:
        reasons["buffers"] = f"this method has a policy of its own, {traits.buffers}"
    for key, why in reasons.items():
        for found in (k for k in keys if k == key or k.startswith(f"{key}.")):
            yield f"{_shown(config, found)}: without effect; {why}"


def _shown(config: DictConfig, key: str) -> str:
    value = OmegaConf.select(config, key)
    return key if OmegaConf.is_config(value) else f"{key}={'null' if value is None else value}"


def _traits(node: DictConfig) -> Any:
    """What the class of a node says of its method; ``None`` if it cannot be imported or says nothing."""
    try:
        return get_object(str(node.get("_target_"))).traits
    except (ImportError, AttributeError, ValueError):
        return None
