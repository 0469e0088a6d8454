"""fedsim: a federated-learning simulator for people who do research and then deploy."""

from __future__ import annotations

import sys
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


class _Moved:
    """Asked last, for a module of ours that is not there: says where what had that name is today."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Raises ``ImportError`` for names of before."""
        if name.startswith(("fedsim.", "clients.", "strategies.")):
            from fedsim.config.moved import refuse

            refuse(name)


sys.meta_path.append(_Moved)
