"""What a ``_target_`` names: is it there, and a class or function; if not, what is."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

from hydra.utils import get_object

from fedsim.errors import ConfigError, hint

SHOWN = 8  # names of a module that a message lists


def check_there(what: str, node: Any) -> Any:
    """What ``node`` names; ``None`` if its module raises as it is imported, which building it will say.

    Raises:
        ConfigError: naming the key, what is not there or no class, and what the module holds instead.
    """
    target = node.get("_target_") if hasattr(node, "get") else None
    if not isinstance(target, str):
        return None
    try:
        found = get_object(target)
    except Exception:  # hydra's and, if the module is theirs, any of the user's
        _refuse_absent(f"{what}._target_={target}", target)
        return None
    if isinstance(found, ModuleType):
        raise ConfigError(
            f"{what}._target_={target}: is a module; name a class or function of it{_of(found)}"
        )
    if not callable(found):
        raise ConfigError(f"{what}._target_={target}: is {_article(found)}, neither a class nor a function")
    return found


def check_derived(what: str, node: Any, has: str, expected: str) -> None:
    """Refuse a class without the attribute ``has``, before it refuses the options of another kind; ``expected`` says
    what is wanted, and what to type."""
    found = check_there(what, node)
    if isinstance(found, type) and not hasattr(found, has):
        raise ConfigError(f"{what}._target_={node['_target_']}: {found.__name__} is no {expected}")


def _refuse_absent(shown: str, target: str) -> None:
    parts, module, depth = target.split("."), None, 0
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        try:
            module, depth = import_module(name), n
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                return  # another one, which a module of theirs imports
            break
        except Exception:  # any of the user's, as the module is imported
            return
    thing: Any = module
    for at, name in enumerate(parts[depth:] if module is not None else (), depth):
        if not hasattr(thing, name):
            raise ConfigError(f"{shown}: there is no {name!r} in {'.'.join(parts[:at])!r}{_of(thing, name)}")
        thing = getattr(thing, name)


def _of(holder: Any, name: str = "") -> str:
    """The name in ``holder`` that is most like ``name``; if none is, some that it has."""
    own = getattr(holder, "__name__", None)
    public = sorted(
        k
        for k, v in vars(holder).items()
        if not k.startswith("_") and (inspect.isclass(v) or inspect.isfunction(v)) and v.__module__ == own
    )
    if name and (near := hint(name, public)):
        return near
    more = ", ..." if len(public) > SHOWN else ""
    return f"; it has {', '.join(public[:SHOWN])}{more}" if public else ""


def _article(thing: Any) -> str:
    kind = type(thing).__name__
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"
