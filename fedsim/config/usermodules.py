"""Which modules hold the user's own code, and which are ours, the standard library's or of installed packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

OURS = frozenset({"fedsim", "strategies", "clients", "conf"})
_OF_CYTHON = ("cython_runtime", "_cython_")  # made while running by compiled packages
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")})


def is_users(name: str | None) -> bool:
    """Whether a module, loaded or not, is the user's: a file of theirs, a notebook or script, or made while running."""
    top = str(name or "").partition(".")[0]
    if top in ("", "__main__", "__mp_main__"):
        return True
    if top in OURS or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return False
    if top.startswith(_OF_CYTHON):
        return False
    place = _place(top)
    return place is None or not (any(name in place for name in _INSTALLED) or place.startswith(_STANDARD))


def importable(name: str) -> bool:
    """Whether a top-level module is loaded or can be found."""
    try:
        return name in sys.modules or find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def users_modules() -> list[ModuleType]:
    """The user's modules that this process has loaded, but for the script or notebook itself."""
    loaded = [(n, m) for n, m in list(sys.modules.items()) if isinstance(m, ModuleType)]
    tops = {n for n, _ in loaded if "." not in n and n not in ("__main__", "__mp_main__") and is_users(n)}
    return [m for n, m in loaded if n.partition(".")[0] in tops]


def home(function: FunctionType) -> str | None:
    """Name of the module in which a function was written; ``functools.wraps`` changes its ``__module__``."""
    name = function.__globals__.get("__name__")
    return name if isinstance(name, str) else None


def _place(top: str) -> str | None:
    """Where a top-level module lies; ``None`` if it has no place, being made while running."""
    loaded: Any = sys.modules.get(top)
    if loaded is None:
        try:
            spec = find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return None
        return spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if file := getattr(loaded, "__file__", None):
        return str(file)
    return next(iter(getattr(loaded, "__path__", ())), None)
