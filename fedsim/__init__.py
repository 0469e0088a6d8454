"""fedsim: a federated-learning simulator for people who do research and then deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunResult", "simulate"]

if TYPE_CHECKING:
    from fedsim.api import RunResult, simulate


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import fedsim`` and the command line start at once."""
    if name in __all__:
        from fedsim import api

        return getattr(api, name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
