"""fedsim: a federated-learning simulator for people who do research and then deploy."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, cast

from fedsim.errors import shadow

__version__ = "0.1.0"
__all__ = ["Callback", "RunResult", "load", "load_run", "simulate"]

if TYPE_CHECKING:
    from fedsim.api import RunResult, load_run, simulate
    from fedsim.report.loaded import load
    from fedsim.tracking import Callback


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import fedsim`` and the command line start at once."""
    if name in __all__:
        import random

        draws = (
            random.getstate()
        )  # importing draws from Python's generator (rich does): the caller's stays as it is
        try:
            return _imported(name)
        finally:
            random.setstate(draws)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")


def _imported(name: str) -> Any:
    if name == "Callback":
        from fedsim.tracking import Callback

        return Callback
    if name == "load":
        from fedsim.report.loaded import load

        return load
    from fedsim import api

    return getattr(api, name)


class _Moved:
    """Asked last, for a module of ours that is not there: what had that name once is found at its place of today."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """How to import a name of before; it comes with a ``FutureWarning`` that says the new one."""
        if not name.startswith(("fedsim.", "clients.", "strategies.")):
            return None
        from fedsim.config.moved import spec

        return spec(name)


sys.meta_path.append(cast(Any, _Moved))
_command = "fedsim.cli" in sys.orig_argv or sys.argv[0].endswith("/fedsim")  # says it in one line itself
if not _command and (hidden := shadow()) is not None:
    raise ImportError(hidden)
