"""Workers of finished runs, kept for the next run of this process: a new worker process costs seconds.

They have imported the modules that their runs needed, and Python imports a module once. So where this process has
loaded a module again since (``importlib.reload``, a notebook's autoreload), they would run the old code and are ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from fedsim.engine.ray.cluster import on_shutdown

Code = dict[str, Any]  # by module name its import spec; a module that is loaded again has a new one
_Kept = tuple[Any, Code]  # a worker, and what it has imported
_kept: list[_Kept] = []


def take(most: int, end: Callable[[Any], object]) -> tuple[list[Any], Code]:
    """Up to ``most`` workers, and the code that these and new ones run. ``end`` ends one that runs old code."""
    now = _loaded()
    good, old = list[_Kept](), list[_Kept]()
    for worker, code in _kept:
        (good if all(now.get(name, spec) is spec for name, spec in code.items()) else old).append(
            (worker, code)
        )
    for worker, _ in old:
        end(worker)
    _kept[:] = good[most:]
    for _, code in good[:most]:
        now = code | now
    return [worker for worker, _ in good[:most]], now


def keep(workers: Iterable[Any], code: Code) -> None:
    """Keep ``workers``, which were taken or started when ``code`` was loaded and have imported more since."""
    code = _loaded() | code
    _kept.extend((worker, code) for worker in workers)
    on_shutdown(_kept.clear)


def _loaded() -> Code:
    return {n: vars(m).get("__spec__") for n, m in list(sys.modules.items()) if isinstance(m, ModuleType)}
