"""Methods of a user's strategy or client that nothing calls, named nearly like one that something does call, or as
other libraries name it."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from types import CodeType, FunctionType

from fedsim.config.usermodules import is_users

LIKE = 0.8  # as for callbacks
ELSEWHERE = {  # what other libraries call such methods, and what may be meant
    "fit": ("train", "local_train", "local_update", "local_training", "client_update", "train_step"),
    "step": ("training_step", "train_step", "local_step", "optimizer_step"),
    "update": ("aggregate_fit", "server_update", "aggregate_updates", "aggregation"),
    "message": ("configure_fit",),
}


def misspelt(thing: object) -> tuple[str, str] | None:
    """A public method of the user's and the one that it may be meant for; ``None`` if there is none.

    Not meant are methods that the user's classes mention themselves, and those beside the one that they are like.
    """
    kinds = [k for k in type(thing).__mro__ if is_users(k.__module__)]
    own = {n: f for k in kinds for n, f in vars(k).items() if isinstance(f, FunctionType) and n[:1] != "_"}
    theirs = {n for k in type(thing).__mro__ if k not in kinds for n in vars(k) if n[:1] != "_"}
    called = {n for n in theirs if callable(getattr(type(thing), n, None))} - own.keys()
    mentioned = {word for f in own.values() for word in _words(f.__code__)}
    for name in sorted(own.keys() - theirs - mentioned):
        near = [n for n, others in ELSEWHERE.items() if n in called and name in others]
        near += [n for n in sorted(called) if SequenceMatcher(None, name.lower(), n).ratio() >= LIKE]
        if near:
            return name, near[0]
    return None


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)
