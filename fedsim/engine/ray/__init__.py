"""Ray actors as workers: the engine, the cluster, and how calls travel."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What was in the module of this name, with a word on where it is now (``fedsim.config.moved``)."""
    if name == "RayEngine":
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
