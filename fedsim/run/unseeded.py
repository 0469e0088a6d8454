"""Calls in the user's code that give something else in every process, whatever the run's seed: ``default_rng()``.

Torch's, NumPy's and Python's own generators are seeded for each client; such calls go around them.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
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
BETWEEN = frozenset({"PRECALL", "PUSH_NULL", "CACHE", "EXTENDED_ARG"})
LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST", "LOAD_ATTR", "LOAD_METHOD")


def unseeded(things: Iterable[Any]) -> str:
    """The first such call in the code of those ``things`` that are the user's, and in what it calls; empty if none."""
    found: dict[str, None] = {}
    for thing in users(things):
        reader = _Calls()
        with suppress(Exception):  # what cannot be read is named elsewhere
            reader.read(thing)
        found |= reader.found
    return next(iter(found), "")


class _Calls(Reader):
    """Notes such calls in the code that it reads."""

    def __init__(self) -> None:
        super().__init__("code", content=False)
        self.found: dict[str, None] = {}

    def _code(self, code: CodeType) -> Iterator[bytes]:
        for name in _called(code):
            self.found[f"{name} in {code.co_qualname}"] = None
        return super()._code(code)


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
