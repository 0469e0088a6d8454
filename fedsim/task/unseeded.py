"""Calls in the user's code that give something else in every process, whatever the run's seed: ``default_rng()``, and
clocks. Torch's, NumPy's and Python's own generators are seeded for each client; such calls go around them."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import CodeType
from typing import Any

from fedsim.config.code import Reader
from fedsim.task.outside import users

WITHOUT_SEED = frozenset(
    {"default_rng", "RandomState", "SeedSequence", "Random", "seed"}
)  # unless one is given
ANYHOW = frozenset(
    {"SystemRandom", "urandom", "uuid1", "uuid4", "token_bytes", "token_hex", "randbits", "getpid"}
)
CLOCKS = frozenset(
    {
        "time_ns",
        "perf_counter",
        "perf_counter_ns",
        "monotonic",
        "monotonic_ns",
        "process_time",
        "process_time_ns",
    }
    | {"thread_time", "thread_time_ns", "default_timer", "utcnow"}
)
OF_MODULES = frozenset({("time", "time"), ("datetime", "now"), ("datetime", "today"), ("date", "today")})
BETWEEN = frozenset({"PRECALL", "PUSH_NULL", "CACHE", "EXTENDED_ARG"})
LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST", "LOAD_ATTR", "LOAD_METHOD")


def unseeded(things: Iterable[Any]) -> str:
    """The first such call in the code of those ``things`` that are the user's, and in what it calls; empty if none."""
    return _first(things, _called)


def clock(things: Iterable[Any]) -> str:
    """The same of calls that ask a clock."""
    return _first(things, _timed)


def _first(things: Iterable[Any], find: Callable[[CodeType], Iterator[str]]) -> str:
    found: dict[str, None] = {}
    for thing in users(things):
        reader = _Calls(find)
        with suppress(Exception):  # what cannot be read is named elsewhere
            reader.read(thing)
        found |= reader.found
    return next(iter(found), "")


class _Calls(Reader):
    """Notes what ``find`` finds in the code that it reads."""

    def __init__(self, find: Callable[[CodeType], Iterator[str]]) -> None:
        super().__init__("code", content=False)
        self.found: dict[str, None] = {}
        self._find = find

    def _code(self, code: CodeType) -> Iterator[bytes]:
        for name in self._find(code):
            self.found[f"{name} in {code.co_qualname}"] = None
        return super()._code(code)


def _timed(code: CodeType) -> Iterator[str]:
    before = last = ""
    for step in dis.get_instructions(code):
        if step.opname in LOADS:
            before, last = last, str(step.argval)
            if last in CLOCKS or (before, last) in OF_MODULES:
                yield f"{before}.{last}" if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else last
        elif step.opname == "CALL" and (before, last) == ("", "time"):  # from time import time
            yield last
        elif step.opname not in BETWEEN:
            before = last = ""


def _called(code: CodeType) -> Iterator[str]:
    last = ""
    for step in dis.get_instructions(code):
        if step.opname == "CALL":
            if step.argval == 0 and last in WITHOUT_SEED:
                yield f"{last}()"
            last = ""
        elif step.opname in LOADS:
            last = str(step.argval)
            if last in ANYHOW:
                yield last
        elif step.opname not in BETWEEN:
            last = ""
