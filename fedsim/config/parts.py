"""From a node of the configuration to the object that it names, or to a plain instance of its type."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from fedsim.config.targets import check_there
from fedsim.errors import ConfigError, FedsimError, hint

OWN = ("fedsim", "strategies", "clients")
PLAIN = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}


def part(node: Any, what: str, **given: Any) -> Any:
    """Instantiate a configuration node; ``given`` is passed where the target accepts it and the node does not set it.

    Raises:
        ConfigError: if the target cannot be found or refuses its arguments, or an option of one of fedsim's own parts
            is of another type than its signature says; its own ``FedsimError`` passes through.
    """
    check_there(what, node)
    check_types(node, what)
    try:
        names = _accepted(node)
        missing = {k: v for k, v in given.items() if (k in names or "**" in names) and node.get(k) is None}
        if node.get("_partial_", False):
            return _bind(instantiate(node, _convert_="all"), missing)
        return instantiate(node, _convert_="all", **missing)
    except (InstantiationException, TypeError) as e:
        chain: list[BaseException] = [e]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        ours = next((c for c in chain if isinstance(c, FedsimError)), None)
        if ours is not None:
            raise ours from None
        raise ConfigError(_refusal(str(chain[-1]), what, node)) from e


def check_types(node: Any, what: str) -> None:
    """Refuse options of fedsim's own parts, at any depth, that are of another type than the part's signature says."""
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    hints = _hints(target) if isinstance(target, str) and target.split(".")[0] in OWN else {}
    for name in map(str, node):
        value, kind = node[name], hints.get(name)
        if isinstance(value, Mapping):
            check_types(value, f"{what}.{name}")
        elif (wanted := _unlike(value, kind)) is not None:
            shown = "null" if value is None else value
            raise ConfigError(f"{what}.{name}={shown}: must be {wanted}{_suiting(str(target), name)}")


def _hints(target: str, *, extras: bool = False) -> dict[str, Any]:
    """Types of the parameters of what ``target`` names; ``extras``: with what is ``Annotated``."""
    try:
        thing = get_object(target)
        typed = thing if is_dataclass(thing) or not inspect.isclass(thing) else thing.__init__
        return get_type_hints(typed, include_extras=extras)
    except Exception:  # building it will say why
        return {}


def _suiting(target: str, name: str) -> str:
    """What suits, where the part says it of an option (``Annotated``); empty where it does not."""
    kind: Any = _hints(target, extras=True).get(name)
    return f", {kind.__metadata__[0]}" if get_origin(kind) is Annotated else ""


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Types of the fields of a configuration dataclass."""
    return get_type_hints(kind)


def _unlike(value: Any, kind: Any) -> str | None:
    """What ``value`` must be to be of type ``kind``; ``None`` if it is, or if ``kind`` is no plain type."""
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    none = type(None) in kinds
    kinds -= {type(None)}
    if len(kinds) != 1 or (value is None and none):
        return None
    single, more = kinds.pop(), ", or null" if none else ""
    inner = [k for k in get_args(single) if k is not Ellipsis]
    if get_origin(single) in (Sequence, list, tuple) and set(inner) <= set(PLAIN):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if listed and all(_fits(v, inner[0]) for v in value):
            return None
        return f"a list, each {PLAIN[inner[0]]}{more}"
    return None if single not in PLAIN or _fits(value, single) else PLAIN[single] + more


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (isinstance(value, int) if kind is int else math.isfinite(value))
    return isinstance(value, kind)


def _refusal(text: str, what: str, node: Any) -> str:
    """One line on why ``node`` cannot be built; a key its target does not know is named with the nearest it does."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        known = sorted(_parameters(get_object(node.get("_target_"))) - {"self", "**"})
        near = hint(unknown[1], known, f"{what}.") or f"; {what} has {', '.join(known)}"
        return f"unknown key '{what}.{unknown[1]}'{near}"
    return f"{what}: {node.get('_target_')} cannot be built: {text.splitlines()[0] if text else 'no reason given'}"


def _accepted(node: Any) -> set[str]:
    """Names of the parameters of what a node names."""
    try:
        return _parameters(get_object(node["_target_"]))
    except Exception:  # building it will say why
        return set()


def _bind(target: partial[Any], more: dict[str, Any]) -> Any:
    """A plain partial: Hydra's own kind would hide the function from whoever looks for it."""
    return partial(target.func, *target.args, **{**target.keywords, **more})


def _parameters(function: Any) -> set[str]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in found}


def as_dataclass(node: Any, kind: type) -> Any:
    """A plain instance of a configuration dataclass (fast attributes, picklable)."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = {str(k): v for k, v in plain.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    for name, kinds in hints_of(kind).items():
        inner = next((t for t in (kinds, *get_args(kinds)) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None and isinstance(values.get(name), Mapping):
            values[name] = as_dataclass(values[name], inner)
    return kind(**values)
