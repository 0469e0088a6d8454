"""Hydra set up on fedsim's configuration tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from fedsim.config.schema import ENGINES, RunConfig
from fedsim.errors import ConfigError, shadow

VERSION_BASE = "1.3"  # of Hydra


def register() -> None:
    """Make the types known to Hydra; calling it again changes nothing.

    Raises:
        ConfigError: as :func:`refuse_shadows` does.
    """
    refuse_shadows()
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig, provider="fedsim")
    for name, node in ENGINES.items():
        store.store(group="schema/engine", name=name, node=node, provider="fedsim")


def refuse_shadows() -> None:
    """Refuse another package named ``conf``, ``clients`` or ``strategies`` that comes first on Python's path.

    Raises:
        ConfigError: naming it, and what to do.
    """
    if (hidden := shadow()) is not None:
        raise ConfigError(hidden)


@contextmanager
def config_loader() -> Iterator[ConfigLoader]:
    """Hydra set up on fedsim's tree for a ``with`` block; an outer Hydra is put back afterwards."""
    register()
    hydra = GlobalHydra.instance()
    version = VersionBase.instance()
    outer, base = hydra.hydra, version.version_base
    hydra.clear()
    try:
        with initialize_config_module("conf", version_base=VERSION_BASE):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer
        version.version_base = base


def config_dir(argv: Sequence[str]) -> Path | None:
    """The folder that Hydra's flag ``--config-dir`` (or ``-cd``) names among the arguments."""
    for flag, value in pairwise(argv):
        if flag in ("--config-dir", "-cd"):
            return Path(value)
    return None
