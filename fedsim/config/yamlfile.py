"""YAML files read, and what is wrong with one said in a line."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from fedsim.config.textfile import read_text
from fedsim.errors import ConfigError

# A reference to another key; whatever else stands behind "${" is computed by a resolver, which may read this machine
REFERENCE = re.compile(r"\$\{\.*[A-Za-z_]\w*(\.\w+|\[\w+\])*\}", re.ASCII)
_SECTION = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)


def read_recorded(path: Path) -> dict[str, Any]:
    """What :func:`read_yaml` gives, of a file that a run has written; sections that many runs share are parsed once.

    They share the parsed values, too, which are not to be written to.
    """
    try:
        found = _by_sections(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        found = None
    return read_yaml(path, recorded=True) if found is None else found


def _by_sections(text: str) -> dict[str, Any] | None:
    """The mapping in ``text``, whose lines at the left margin each begin an entry; ``None`` if that cannot be told."""
    head, *sections = _SECTION.split(text)
    if head or not sections or _libyaml() is None or any(sign in text for sign in ("${", "!", "&", "*")):
        return None
    found: dict[str, Any] = {}
    for section in sections:
        entry = _section(section)
        if not isinstance(entry, dict) or len(entry) != 1 or entry.keys() & found.keys():
            return None
        found |= entry
    return found if all(isinstance(key, str) for key in found) else None


@lru_cache(maxsize=4096)
def _section(text: str) -> Any:
    return yaml.load(text, _libyaml())


def read_yaml(path: Path, what: str = "", recorded: bool = False) -> dict[str, Any]:
    """The resolved mapping in a YAML file; messages begin with the path and ``what``.

    Of what a run ``recorded``, which may come from elsewhere, only references to other keys are resolved.

    Raises:
        ConfigError: naming the file, and the line if it is broken.
    """
    try:
        found = _plain(path, recorded)
    except YAMLError as error:
        raise ConfigError(broken(error, f"{path}{what}")) from error
    except (OSError, OmegaConfBaseException, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{what}: cannot be read ({said})") from error
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}{what}: holds no settings")
    return {str(key): value for key, value in found.items()}


def _plain(path: Path, recorded: bool) -> Any:
    """What OmegaConf makes of the file, its references resolved; where there are none, in a tenth of the time."""
    loader = _libyaml()
    text = read_text(path)
    if loader is not None and "${" not in text and "!" not in text:
        try:
            return yaml.load(text, loader)
        except YAMLError:
            pass  # the other says what is wrong, and where
    found = OmegaConf.load(io.StringIO(text))
    written = OmegaConf.to_container(found, resolve=False)
    if recorded and any("${" in REFERENCE.sub("", said) for said in _texts(written)):
        raise ValueError(
            'something like "${oc.env:HOME}" in it would be computed on this machine; runs record values: write the '
            "value itself"
        )
    return OmegaConf.to_container(found, resolve=True)


def _texts(value: Any) -> Iterator[str]:
    """Every text among nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@cache
def _libyaml() -> Any:
    """A loader of YAML in C that takes numbers, dates and repeated keys as OmegaConf does; ``None`` without libyaml."""
    if not hasattr(yaml, "CSafeLoader"):
        return None
    from omegaconf._utils import get_yaml_loader

    class Plain(yaml.CSafeLoader):
        """As fast as libyaml."""

        yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if names and max(names.values()) > 1:
                raise YAMLError("a key stands twice")
            return super().construct_mapping(node, deep=deep)

    return Plain


def broken(error: YAMLError, path: str = "") -> str:
    """``conf/strategy/mine.yaml, line 3: no valid YAML (expected ',' or ']')``."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"{path or 'a configuration file'}: no valid YAML ({' '.join(str(error).split())})"
    mark = error.problem_mark
    return f"{path or mark.name}, line {mark.line + 1}: no valid YAML ({error.problem})"
