"""Turn Hydra's and OmegaConf's errors into one line that names the key and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hydra import compose as hydra_compose
from hydra.core.object_type import ObjectType
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.tree import config_dir, config_loader
from fedsim.errors import FedsimError, hint

_CONVERT = re.compile(
    r"Value '(?P<value>.*)' of type '(?P<type>\w+)' could not be converted to (?P<want>\w+)"
)
_WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One line on what is wrong with the configuration, and what to write instead."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, InstantiationException):
        return _constructor(error, overrides)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _option(error)
    text = str(error)
    if "Ambiguous value for argument" in text:
        return f"{_quoted(text)}: several values need a sweep; add -m"
    if unknown := re.match(r"Could not override '([^']*)'", text):
        bad = unknown.group(1).split("@")[0].replace("/", ".")
        if bad.startswith("system.") and not any(o.startswith("system=") for o in overrides):
            return f"{unknown.group(1)}: there are no devices yet; add system=lognormal, table or phones"
        return f"unknown key {bad!r}{_near_key(bad, overrides)}"
    if "Config group override must be" in text:
        empty = [o for o in overrides if o.endswith("=null")]
        return f"{' '.join(empty) or text}: a group needs the name of one of its options"
    if "Multiple values for " in text:
        return f"{text.split('.', 1)[0].splitlines()[0]}: write it once, and without '+'"
    for cause in _chain(error):
        if isinstance(cause, OmegaConfBaseException):
            return _value(cause, overrides)
    return " ".join(text.split())


def known_keys(overrides: Sequence[str] = ()) -> list[str]:
    """All keys, dotted, of the configuration that the valid group choices among ``overrides`` make."""
    with config_loader() as loader:
        groups = loader.get_group_options("", ObjectType.GROUP)
        choices = [o.split(",")[0] for o in overrides if o.partition("=")[0] in groups]
        searchpath = [o for o in overrides if o.startswith("hydra.searchpath=")]
        if extra := config_dir(overrides):
            searchpath = [f"hydra.searchpath=[file://{extra.absolute()}]"]
        try:
            config = hydra_compose("config", overrides=searchpath + choices)
        except (HydraException, OmegaConfBaseException):
            config = hydra_compose("config")
    return list(_flatten(config, ""))


def _flatten(config: DictConfig, prefix: str) -> Iterator[str]:
    for key in config:
        name = f"{prefix}{key!s}"
        yield name
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _flatten(node, f"{name}.")


def _near_key(bad: str, overrides: Sequence[str]) -> str:
    """The same name elsewhere, else the likest key beside it, else the likest of all."""
    keys = [k for k in known_keys(overrides) if not k.endswith("_") and k != bad]
    parent, _, last = bad.rpartition(".")
    if same := [k for k in keys if k.rpartition(".")[2] == last]:
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    if near := hint(last, siblings, f"{parent}." if parent else ""):
        return near
    if parent and siblings:
        return f"; {parent} has {', '.join(siblings)}"
    return hint(bad, keys)


def _value(error: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    """A value of the wrong type, an unknown key in a file, or a broken interpolation."""
    first = str(error).splitlines()[0]
    key = error.full_key or str(error.key or "configuration")
    if wrong := _CONVERT.match(first):
        return f"{key}={wrong['value']}: must be {_WANTED.get(wrong['want'], 'of type ' + wrong['want'])}"
    if bool_ := re.match(r"Value '(.*)' is not a valid bool", first):
        return f"{key}={bool_[1]}: must be true or false"
    if "not in" in first and error.full_key:
        return f"unknown key {key!r}{_near_key(key, overrides)}"
    return f"{key}: {first}"


def _unreadable(error: OverrideParseException) -> str:
    first = str(error.message).splitlines()[0]
    if "missing EQUAL" in error.message:
        return f"{error.override!r} is neither a command (report, verify) nor a setting: write key=value"
    return f"cannot read the setting {error.override!r}: {first}; quote values that hold special characters"


def _option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"no such configuration file: {option!r}"
    near = hint(option, error.options or ())
    known = f" (there are: {', '.join(error.options)})" if error.options and not near else ""
    return f"{group}={option}: no such option{near}{known}"


def _constructor(error: InstantiationException, overrides: Sequence[str]) -> str:
    """What a part's own constructor refused; its words, with the key of the part."""
    lines = str(error).splitlines()
    where = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    causes = [c for c in _chain(error) if c is not error]
    for cause in causes:
        if isinstance(cause, FedsimError):
            return str(cause)
    text = " ".join(str(causes[-1] if causes else lines[0]).split())
    if lines[0].startswith("Error locating target"):
        return f"{where}._target_={_quoted(lines[0])}: cannot be imported: {text}"
    if "unexpected keyword argument" in text:
        bad = f"{where}.{_quoted(text)}"
        return f"unknown key {bad!r}{_near_key(bad, overrides)}"
    return f"{where}: {text}" if where else text


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _quoted(text: str) -> str:
    found = re.search(r"'([^']*)'", text)
    return found.group(1) if found else text
