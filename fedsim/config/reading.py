"""Overrides put together by Hydra: the tree of files once for each choice of options, values on a copy of it.

Most of what Hydra does for a configuration is reading and merging files, and depends on the options chosen alone
(``strategy=fedspeed``). Sweeps and notebooks ask for the same ones again and again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from hydra import compose as hydra_compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from fedsim.config.schema import RunConfig
from fedsim.config.tree import config_loader, refuse_shadows
from fedsim.config.words import CONF

Found = tuple[DictConfig, str | None]
_SETS = re.compile(r"\+{0,2}(?!hydra\.)(\w+)(\.[^=@/]+)?=")  # a value, or an option of a group at the top


def composed(words: Sequence[str]) -> Found:
    """The configuration of overrides that Hydra can read, and the strategy option chosen.

    Raises:
        HydraException, OmegaConfBaseException, YAMLError: as ``hydra.compose`` does.
    """
    refuse_shadows()
    values = [word for word in words if _is_value(word)]
    choices = tuple(word for word in words if not _is_value(word))
    parsed = [_parsed(word) for word in values]
    if any(word.startswith("hydra.") for word in choices) or any(o.is_sweep_override() for o in parsed):
        return _compose(tuple(words))  # further folders; or an error
    config, choice = _of_choices(choices, _tree())
    config = deepcopy(config)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    return config, choice


def chosen_method(choices: Mapping[str, Any]) -> str | None:
    """The strategy option chosen; for one around another, both: ``ggeur+scaffold``."""
    outer, base = choices.get("strategy"), choices.get("strategy@strategy.base")
    return f"{outer}+{base}" if outer and base else outer


def _is_value(word: str) -> bool:
    """Whether a word gives a key a value, and chooses no file."""
    found = _SETS.match(word)
    if found is None:
        return False
    top, below = found.groups()
    return bool(below) or (top in RunConfig.__dataclass_fields__ and not (CONF / top).is_dir())


@lru_cache(maxsize=4096)
def _parsed(word: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override


@lru_cache(maxsize=128)
def _of_choices(words: tuple[str, ...], tree: object) -> Found:
    """Those of ``words`` alone, for the files as they are in ``tree``."""
    return _compose(words)


def _compose(words: tuple[str, ...]) -> Found:
    with config_loader():
        config = hydra_compose("config", overrides=list(words), return_hydra_config=True)
    choice = chosen_method(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choice


def _tree() -> tuple[tuple[str, int, int], ...]:
    """All files of the configuration, with their sizes and when they were written: whoever edits one gets it."""
    found = []
    for folder, _, names in os.walk(CONF):
        for name in names:
            if name.endswith(".yaml"):
                stat = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - a millisecond for all
                found.append((f"{folder}/{name}", stat.st_size, stat.st_mtime_ns))
    return tuple(found)
