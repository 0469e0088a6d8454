"""How a plan reaches Ray's workers: with the user's code by value, as it is in this process, not as files hold it."""

from __future__ import annotations

import copyreg
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

from fedsim.config.code import Reader
from fedsim.config.usermodules import users_modules
from fedsim.engine.assignments import Plan
from fedsim.engine.ray.cluster import ours
from fedsim.engine.ray.inplace import InPlace
from fedsim.engine.ray.tensors import referring
from fedsim.errors import ConfigError, EngineError

_WORKERS_OWN = ("CUDA_", "RAY_")  # variables of which each worker has its own


class Sent(NamedTuple):
    """A plan in Ray's object store, and what whoever reads it must have imported alike."""

    stored: Any
    code: str | None  # digest of the plan's code; None: all of it travels by value, or is not the user's
    modules: tuple[str, ...]  # of the user's, which workers import by themselves
    kept: tuple[Any, ...] = ()  # what the plan refers to in the object store
    environment: Mapping[
        str, str | None
    ] = {}  # variables that the code asks for, as they are in this process


def _without_lock(of: cached_property[Any]) -> tuple[Any, ...]:
    """A cached property of a class that travels by value; before Python 3.12 it holds a lock, which cannot."""
    return cached_property, (of.func,), {"attrname": of.attrname}


copyreg.pickle(cached_property, _without_lock)


def refuse_patched(plan: Plan) -> tuple[str | None, Reader]:
    """What ``_read`` gives.

    Raises:
        EngineError: if the user's functions have replaced some of a package's, which workers would not see.
    """
    code, found = _read(plan)
    if found.patched:
        raise EngineError(
            f"{', '.join(found.patched)} was replaced in this process, but Ray's workers run the package's own: "
            "write a subclass instead, or give engine=serial"
        )
    return code, found


def send(ray: Any, plan: Plan, moved: InPlace) -> Sent:
    """Put ``plan`` into the object store once; ``moved``: what of it lies where workers map it. Raises as above."""
    code, found = refuse_patched(plan)
    others = ray if not ours() and sum(node["Alive"] for node in ray.nodes()) > 1 else None
    modules = tuple(found.imported)
    try:
        with _by_value([module.__name__ for module in users_modules()]), referring(others, moved) as kept:
            stored = ray.put(plan)
    except Exception as error:  # whatever the user's objects raise when pickled
        with referring(others, moved) as kept:
            stored = ray.put(plan)
        modules = tuple(found.modules)
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the code of this run cannot be sent to Ray's workers as it is in this process ({reason[0]}); they import "
            "it from its files instead, and the run stops if those hold another code than this process has loaded",
            stacklevel=3,
        )
    environment = {k: v for k, v in found.environment.items() if not k.startswith(_WORKERS_OWN)}
    return Sent(stored, code if modules else None, modules, tuple(kept), environment)


def adopt(environment: Mapping[str, str | None]) -> None:
    """In a worker: let the code find the variables of the environment that it asks for as the driver has them."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check(plan: Plan, code: str | None, modules: tuple[str, ...]) -> None:
    """In a worker: refuse ``plan`` if the modules imported here make another code of it than the driver's ``code``."""
    if code is not None and _read(plan)[0] not in (None, code):
        raise EngineError(
            f"Ray's workers import other code than this process runs, from one of {', '.join(modules)}: it was edited "
            "since it was imported here, or changed while running; importlib.reload it, restart, or give engine=serial"
        )


def forget_classes() -> None:
    """In a worker: let the next plan bring classes of its own, where cloudpickle would update those of the last."""
    from ray.cloudpickle import cloudpickle

    cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.clear()


def _read(plan: Plan) -> tuple[str | None, Reader]:
    """Digest of the plan's code, without the content of tensors, and what was met on the way."""
    reader, code = Reader("code", content=False), None
    with suppress(ConfigError):  # it holds what pickle, which comes next, will name
        code = reader.read((plan.client, plan.task.loss, plan.task.model))
    for other in (plan.task.forward, plan.task.metrics, plan.data.dataset.augment, plan.views):
        with suppress(Exception):  # whatever users' objects raise: what was met before is noted
            reader.read(other)
    return code, reader


@contextmanager
def _by_value(names: list[str]) -> Iterator[None]:
    """Let Ray pickle the functions and classes of these modules by value."""
    from ray.cloudpickle import cloudpickle

    registered: set[str] = cloudpickle._PICKLE_BY_VALUE_MODULES
    added = set(names) - registered
    registered |= added
    try:
        yield
    finally:
        registered -= added
