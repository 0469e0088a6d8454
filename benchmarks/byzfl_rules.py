"""ByzFL's rules, pre-aggregators and attacks, without the rest of that package, which needs torchvision."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def load() -> dict[str, Any]:
    """Its classes by name; empty if it is not installed (``pip install --no-deps byzfl``)."""
    spec = find_spec("byzfl")
    if spec is None:
        return {}
    package, before = ModuleType("byzfl"), set(sys.modules)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["byzfl"] = package  # without running its __init__
    try:
        found = {}
        for name in ("aggregators", "attacks.attacks"):
            found |= vars(importlib.import_module(f"byzfl.{name}"))
        return found
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "byzfl":
                del sys.modules[name]
