"""What a configuration that comes from elsewhere may build: names on a list, checked before anything is built.

A node of a deployment (``fedsim.flower.options``), ``encoder=from_run``, ``fedsim verify`` and whatever else computes a
run again or rebuilds its model from its folder (``fedsim.cli.arguments.check_runs``) read settings that somebody else
wrote. Each ``_target_`` in them names a callable of this process, so only these are built:

* what the YAML files of ``conf/`` name, functions included;
* public classes that ``strategies``, ``clients``, the rooms of parts (:data:`ROOMS`) and those parts of torchmetrics
  that only compute define themselves, by names that lead straight to them;
* what the owner of this machine names: in ``FEDSIM_ALLOW``, in a node's ``allow``, after ``--allow``.

Hydra's own list of blocked targets (1.3.4 and later, by identity since 1.3.6) stays in force behind this one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.moved import now
from fedsim.config.words import CONF
from fedsim.config.yamlfile import REFERENCE
from fedsim.errors import ConfigError

VARIABLE = "FEDSIM_ALLOW"  # modules and dotted names, separated by spaces or commas
# Where classes may be named that no file of conf/ names
ROOMS = (
    "strategies",
    "clients",
    "fedsim.models",
    "fedsim.sampling",
    "fedsim.system",
    "fedsim.topology",
    "fedsim.local.pretext",
    "fedsim.data.augment",
    "fedsim.data.views",
    "fedsim.data.warps",
)
# Of torchmetrics what computes; other parts of it fetch models
METRICS = tuple(
    f"torchmetrics.{kind}" for kind in ("aggregation", "classification", "regression", "segmentation")
)
FINDERS = ("hydra.utils.get_method", "hydra.utils.get_object", "hydra.utils.get_class")  # by their ``path``
KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")  # that mean something to Hydra
CONVERSIONS = ("none", "partial", "object", "all")
_DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", re.ASCII)
_NAMED = re.compile(r"_target_: *[\"']?([A-Za-z]\w*(?:\.\w+)+)", re.ASCII)
_FOUND = re.compile(r"hydra\.utils\.get_\w+, path: *([A-Za-z]\w*(?:\.\w+)+)", re.ASCII)
_COMMENT = re.compile(r"(^|\s)#.*")
_granted: ContextVar[tuple[str, ...]] = ContextVar("granted", default=())


@contextmanager
def granted(names: Iterable[str]) -> Iterator[None]:
    """Within it, these modules and dotted names are on the list too."""
    token = _granted.set((*_granted.get(), *names))
    try:
        yield
    finally:
        _granted.reset(token)


def listed(text: str, where: str) -> tuple[str, ...]:
    """Modules and dotted names in ``text``; ConfigError names ``where`` it was written if one is none."""
    names = tuple(re.split(r"[\s,]+", text.strip())) if text.strip() else ()
    for name in names:
        if not _DOTTED.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} is neither a module nor a dotted name (my_module my.module.Class)"
            )
    return names


def check_words(overrides: Sequence[str]) -> None:
    """Refuse overrides that would read this machine while they are composed: resolvers, and keys of Hydra itself.

    Raises:
        ConfigError: naming the override.
    """
    for word in overrides:
        if re.match(r"hydra\b", word.lstrip("+~'\" ")):
            raise ConfigError(f"{word}: Hydra's own settings may not come from elsewhere; leave it out")
        _check_text(word, word.partition("=")[0])


def check_allowed(config: Any, what: str = "") -> None:
    """Refuse a configuration, or a node of one, in which anything is not on the list; nothing is built.

    Args:
        config: plain values, or OmegaConf's as they were composed. Interpolations of other keys (``${seed}``) are
            looked at before they are resolved, and again with the values that they stand for.
        what: the node's own key, for messages.

    Raises:
        ConfigError: for the first key that is refused, with its value and what to type if it is to be trusted.
    """
    if isinstance(config, DictConfig | ListConfig):
        try:
            _walk(OmegaConf.to_container(config, resolve=False), what, raw=True)
            config = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or what}: {str(error).splitlines()[0]}") from error
    _walk(config, what, raw=False)


def _walk(value: Any, key: str, raw: bool) -> None:
    if isinstance(value, str):
        _check_text(value, key, resolved=not raw)
    elif isinstance(value, Mapping):
        if not raw:
            _check_keys(value, key)
        for name, inner in value.items():
            _walk(inner, f"{key}.{name}" if key else str(name), raw)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for at, inner in enumerate(value):
            _walk(inner, f"{key}[{at}]", raw)


def _check_text(text: str, key: str, resolved: bool = False) -> None:
    """References to other keys may stand in what is not resolved yet; no resolver may, by which machines are read."""
    rest = text if resolved else REFERENCE.sub("", text)
    if "${" in rest:
        raise ConfigError(
            f"{key}: {text!r} would be computed on this machine; only references to other settings, such as "
            "${seed}, may come from elsewhere: write the value itself"
        )


def _check_keys(node: Mapping[Any, Any], key: str) -> None:
    for name in map(str, node):
        if name.startswith("_") and name.endswith("_") and name not in KEYS:
            raise ConfigError(f"{key}.{name}: no key of a part; those of Hydra are {', '.join(KEYS)}")
    for name in ("_partial_", "_recursive_"):
        if not isinstance(node.get(name, False), bool):
            raise ConfigError(f"{key}.{name}={node[name]!r}: must be true or false")
    if node.get("_convert_", "none") not in CONVERSIONS:
        raise ConfigError(f"{key}._convert_={node['_convert_']!r}: must be one of {', '.join(CONVERSIONS)}")
    if not isinstance(node.get("_args_", []), list):
        raise ConfigError(f"{key}._args_={node['_args_']!r}: must be a list")
    target = node.get("_target_")
    if target is None:
        return
    _check_target(target, f"{key}._target_")
    if target in FINDERS:
        if extra := sorted(set(map(str, node)) - {"_target_", "path"}):
            raise ConfigError(f"{key}.{extra[0]}: {target} takes a path, and nothing else")
        _check_target(node.get("path"), f"{key}.path")


def _check_target(target: Any, key: str) -> None:
    if not isinstance(target, str) or not _DOTTED.fullmatch(target):
        raise ConfigError(f"{key}={target!r}: must be the dotted name of a class or function")
    target = now(target) or target  # names of before mean what they stand for today
    found = key.endswith(".path")  # a finder's, which may not find another finder
    if target in FINDERS and not found:
        return
    if target not in FINDERS and (target in _of_conf() or _is_of_rooms(target) or _is_granted(target)):
        return
    module = target.rpartition(".")[0] or target
    raise ConfigError(
        f"{key}={target}: not among what settings from elsewhere may build here (what conf/ names, classes of "
        f"strategies, clients and fedsim's parts). If its code is to be trusted, the owner of this machine says so: "
        f'{VARIABLE}={module}, or allow="{module}" in --node-config, or --allow {module} behind the command'
    )


@cache
def _of_conf() -> frozenset[str]:
    """Dotted names that the files of ``conf/`` name as targets, or as what a finder finds."""
    found = set[str]()
    for file in CONF.rglob("*.yaml"):
        for line in file.read_text(encoding="utf-8").splitlines():
            code = _COMMENT.sub("", line)
            found.update(_NAMED.findall(code), _FOUND.findall(code))
    return frozenset(n for n in found if not n.startswith(("hydra.", "fedsim.cli.")))


def _is_of_rooms(target: str) -> bool:
    """Whether it is a public class that a room defines itself, not one that a module there imports."""
    if not _inside(target, (*ROOMS, "torchmetrics")):
        return False
    found, rest = _located(target)
    return not rest and isinstance(found, type) and _inside(found.__module__, (*ROOMS, *METRICS))


def _is_granted(target: str) -> bool:
    """Whether the machine's owner named it, or its module, in which it must then be defined."""
    names = (*_granted.get(), *listed(os.environ.get(VARIABLE, ""), VARIABLE))
    if target in names:
        return True
    around = [name for name in names if _inside(target, (name,))]
    if not around:
        return False
    found, rest = _located(target)
    return not rest and callable(found) and _inside(str(getattr(found, "__module__", "")), around)


def _inside(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _located(target: str) -> tuple[Any, list[str]]:
    """What the innermost module on the way holds under the next name, and names that follow: attributes of it."""
    parts, module, used = target.split("."), None, 0
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        try:
            if name not in sys.modules and find_spec(name) is None:
                break
            module, used = import_module(name), depth
        except (ImportError, ValueError):  # no such module, or none inside
            break
        except Exception as error:
            raise ConfigError(f"{name}: cannot be imported: {type(error).__name__}: {error}") from error
    if module is None:
        return None, parts
    return getattr(module, parts[used], None), parts[used + 1 :]
