"""From a node of the configuration to the object that it names, or to a plain instance of its type."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from typing import Any, get_args, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from fedsim.errors import ConfigError, FedsimError, hint


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
        near = hint(unknown[1], known, f"{what}.") or f"; {what} has {', '.join(known)}"
        return f"unknown key '{what}.{unknown[1]}'{near}"
    return f"{what}: {node.get('_target_')} cannot be built: {text.splitlines()[0] if text else 'no reason given'}"


def _bind(target: partial[Any], more: dict[str, Any]) -> Any:
    """A plain partial: Hydra's own kind would hide the function from whoever looks for it."""
    return partial(target.func, *target.args, **{**target.keywords, **more})


def _parameters(function: Any) -> set[str]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in found}


def typed(node: Any, kind: type) -> Any:
    """A plain instance of a configuration dataclass (fast attributes, picklable)."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = {str(k): v for k, v in plain.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    for name, kinds in get_type_hints(kind).items():
        inner = next((t for t in (kinds, *get_args(kinds)) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None and isinstance(values.get(name), Mapping):
            values[name] = typed(values[name], inner)
    return kind(**values)
