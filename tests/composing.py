"""``compose``, quickly: Hydra takes ten times as long as a tiny run, and most runs of a suite differ in values only."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.compose import compose

PLAIN = (
    "seed",
    "rounds",
    "dtype",
    "num_clients",
    "clients_per_round",
    "participation",
    "buffers",
    "out",
    "dir",
)


def compose_quickly(overrides: Sequence[str] = ()) -> DictConfig:
    """What ``compose`` gives: options are composed once, values are then set as Hydra sets them."""
    overrides = tuple(overrides)
    parsed = [_value(o) for o in overrides]
    options = tuple(o for o, value in zip(overrides, parsed, strict=True) if value is None)
    config = copy.deepcopy(composed(options))
    try:
        for value in filter(None, parsed):
            OmegaConf.update(config, value.key_or_group, value.value(), merge=True)
    except OmegaConfBaseException:
        return compose(overrides)  # which says what is wrong
    return config


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    """``compose``, once per set of overrides; not to be changed."""
    return compose(overrides)


@cache
def _value(override: str) -> Override | None:
    """The parsed override if it sets a value; ``None`` if it chooses an option, adds or removes a key."""
    key = override.partition("=")[0]
    nested = "." in key and not key.startswith("hydra.") and re.fullmatch(r"[\w.]+", key)
    if key not in PLAIN and not nested:
        return None
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    return None if parsed.is_sweep_override() else parsed
