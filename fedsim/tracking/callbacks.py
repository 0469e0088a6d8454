"""A caller's own callbacks: checked before a run starts; told of rounds; what they raise ends it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import SequenceMatcher

from fedsim.errors import ConfigError

HOOKS = {  # with their arguments, or the ways to give them
    "start": ("run",),
    "phase": ("text",),
    "evaluated": ("info",),
    "round": ("row, clients", "info"),
    "end": ("summary",),
}
LIKE = 0.8  # a method whose name is so similar to a hook's was meant to be it
WORDS = frozenset(
    {*HOOKS, "on", "before", "after", "begin", "finish", "each", "epoch", "train"}
)  # of others' hooks
EXPECTED = "an object with any of the hooks " + ", ".join(
    " or ".join(f"{name}({given})" for given in ways) for name, ways in HOOKS.items()
)


def admitted(callbacks: Iterable[object]) -> list[object]:
    """The callbacks, each with a hook at least and none that is misspelt.

    Raises:
        ConfigError: naming the callback and the hooks that there are.
    """
    if any(callable(getattr(callbacks, hook, None)) for hook in HOOKS) or not isinstance(callbacks, Iterable):
        raise ConfigError(f"callbacks: expected a list, got {_named(callbacks)}; type callbacks=[...]")
    found = list(callbacks)
    for callback in found:
        _check(callback)
    return found


def _check(callback: object) -> None:
    name = f"callbacks: {_named(callback)}"
    if inspect.isroutine(callback):
        raise ConfigError(f"{name} is a function, which nothing would call; expected {EXPECTED}")
    if isinstance(callback, type):
        raise ConfigError(f"{name} is a class; hand over an object, {callback.__name__}()")
    for hook in HOOKS:
        if (found := getattr(callback, hook, None)) is not None and not callable(found):
            raise ConfigError(
                f"{name}: {hook} is {type(found).__name__}, which nobody can call; define {hook}(...)"
            )
    methods = [m for m in dir(callback) if not m.startswith("_") and callable(getattr(callback, m, None))]
    for method in methods:
        if method not in HOOKS and (meant := _meant(method)):
            raise ConfigError(f"{name} has {method}(), which nothing would call{meant}; expected {EXPECTED}")
    hooks = [m for m in methods if m in HOOKS]
    if not hooks:
        raise ConfigError(f"{name} has no hook, so nothing would call it; expected {EXPECTED}")
    for hook in hooks:
        _check_arguments(name, callback, hook)


def _meant(method: str) -> str:
    """Says which hook a name was meant for; empty where it looks like none."""
    words = method.lower().split("_")
    like = [h for h in HOOKS if SequenceMatcher(None, method.lower(), h).ratio() >= LIKE]
    if not (like or words[0] == "on" or (len(words) > 1 and set(words) <= WORDS)):
        return ""
    near = like or [h for h in HOOKS if h in words]
    return f" (is it {near[0]}?)" if near else " (a hook of another library?)"


def _check_arguments(name: str, callback: object, hook: str) -> None:
    """Refuse a hook that cannot be called with its arguments."""
    ways = HOOKS[hook]
    if not any(_callable(callback, hook, given) for given in ways):
        signature = inspect.signature(getattr(callback, hook))
        called = " or ".join(f"{hook}({given})" for given in ways)
        raise ConfigError(f"{name}: {hook}{signature} is called as {called}")


def takes_info(callback: object) -> bool:
    """Whether ``callback.round`` takes one argument, a ``RoundInfo``, instead of a tracker's two."""
    hook = "round"
    return callable(getattr(callback, hook, None)) and not _callable(callback, hook, "row, clients")


def _callable(callback: object, hook: str, given: str) -> bool:
    """Whether the hook can be called with the arguments ``given``."""
    try:
        signature = inspect.signature(getattr(callback, hook))
    except (TypeError, ValueError):  # of something built in
        return True
    try:
        signature.bind(*given.split(", "))
    except TypeError:
        return False
    return True


def _named(thing: object) -> str:
    return str(getattr(thing, "__qualname__", None) or type(thing).__name__)
