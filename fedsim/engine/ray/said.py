"""What clients' code prints and warns of in a worker process, brought to the driver and marked with the client.

A worker's ``sys.stdout`` and ``sys.stderr`` note lines while a call is made; they travel with its result, if there are
any, and the driver prints them in the order of results, which is that of clients.
"""

from __future__ import annotations

import io
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fedsim.engine.assignments import ChunkResult
from fedsim.errors import ClientError, EngineError

ALONE = "under engine=ray clients are computed in processes without a terminal: type engine=serial to debug"


@dataclass(frozen=True)
class Line:
    """A line printed (``place`` is stdout or stderr), or a warning with its category (``place`` is file and line)."""

    who: str
    text: str
    place: str | tuple[str, int]
    category: Any = None


@dataclass(frozen=True)
class Said:
    """A call's result with what was said meanwhile; ``error`` if it raised."""

    result: Any
    lines: list[Line]
    error: Exception | None = None


class Interrupted(Exception):  # noqa: N818
    """A client's code raised KeyboardInterrupt; the driver raises it again."""


class Ear:
    """Hears what is printed and warned of in this process, on behalf of who is at work: ``serving()``."""

    def __init__(self) -> None:
        self.serving: Callable[[], Sequence[int] | None] = lambda: None
        self._streams: dict[str, Any] = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._hears = False
        self._lines: list[Line] = []
        self._open: dict[str, tuple[str, str]] = {}  # by stream: who began a line, and what there is of it
        self._warned: set[Any] = set()

    def install(self) -> None:
        """Take the place of this process's streams, warnings and debugger."""
        sys.stdout, sys.stderr = _Stream(self, "stdout"), _Stream(self, "stderr")
        sys.stdin, sys.breakpointhook = _NoTerminal(), _no_debugger
        warnings.showwarning = self._warning  # type: ignore[assignment]

    def begin(self, serving: Callable[[], Sequence[int] | None]) -> None:
        """A run begins: its warnings are to be heard though an earlier run had the same."""
        self.serving = serving
        self._warned.clear()
        warnings.simplefilter("default")  # once a place; what is shown is for the driver's filters to say

    def write(self, stream: str, text: str) -> None:
        """Note what is printed, line by line."""
        if not self._hears:  # Ray's own
            self._streams[stream].write(text)
            return
        who = _name(self.serving())
        before, begun = self._open.pop(stream, (who, ""))
        if before != who and begun:
            self._lines.append(Line(before, begun, stream))
            begun = ""
        *whole, rest = (begun + text).split("\n")
        self._lines += [Line(who, line, stream) for line in whole]
        if rest:
            self._open[stream] = who, rest

    def hear(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``; what it says is noted."""
        self._hears = True
        try:
            return work()
        finally:
            self._hears = False

    def heard(self) -> list[Line]:
        """All that was said since this was last asked."""
        if self._open:
            self._lines += [Line(who, text, stream) for stream, (who, text) in self._open.items()]
            self._open.clear()
        lines, self._lines = self._lines, []
        return lines

    def call(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, as :class:`Said` where something was said or it raised after that."""
        try:
            result = self.hear(work)
        except KeyboardInterrupt:
            return Said(None, self.heard(), Interrupted("in a client's code"))
        except Exception as error:
            if self._lines or self._open:
                return Said(None, self.heard(), portable(error))
            raise
        if isinstance(result, ChunkResult):
            for outcome in result.outcomes:
                if outcome.error is not None:
                    outcome.error = portable(outcome.error)
        return Said(result, self.heard()) if self._lines or self._open else result

    def _warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
    ) -> None:
        key = category, str(message), filename, lineno
        if self._hears and key not in self._warned:
            self._warned.add(key)
            kind = category if category.__module__ == "builtins" else _by_value(category)
            self._lines.append(Line(_name(self.serving()), str(message), (filename, lineno), kind))


class Speaker:
    """Says in the driver what workers' code said: warnings once each in a run."""

    def __init__(self) -> None:
        self._warned: set[Any] = set()

    def result(self, value: Any) -> Any:
        """The result of a call, after what was said in it."""
        if not isinstance(value, Said):
            return value
        for line in value.lines:
            self._say(line)
        if isinstance(value.error, Interrupted):
            raise KeyboardInterrupt(str(value.error))
        if value.error is not None:
            raise value.error
        return value.result

    def _say(self, line: Line) -> None:
        text = f"{line.who}: {line.text}"
        if isinstance(line.place, str):
            print(text, file=getattr(sys, line.place), flush=True)
        elif (key := (line.text, line.place)) not in self._warned:
            self._warned.add(key)
            warnings.warn_explicit(text, line.category, *line.place)


class _Stream(io.TextIOBase):
    def __init__(self, ear: Ear, name: str):
        self._ear, self.name = ear, name

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._ear.write(self.name, text)
        return len(text)


class _NoTerminal(io.TextIOBase):
    def readline(self, size: int | None = -1) -> NoReturn:
        raise ClientError(f"input or a debugger was asked for, but {ALONE}")


def _no_debugger(*_: Any, **__: Any) -> NoReturn:
    raise ClientError(f"breakpoint(): {ALONE}")


def portable(error: BaseException) -> Any:
    """``error`` such that it travels, its traceback as a note; classes of the user's too (by value), else its text."""
    text = "".join(traceback.format_exception(error))
    try:
        return _by_value(error, f"In a worker:\n{text}")
    except Exception:
        return EngineError(f"in a worker: {text}")


class _ByValue:
    """What the driver gets back as the object itself, though its class may exist in no module."""

    def __init__(self, blob: bytes, note: str):
        self.blob, self.note = blob, note

    def __reduce__(self) -> Any:
        return _opened, (self.blob, self.note)


def _by_value(thing: Any, note: str = "") -> _ByValue:
    from ray import cloudpickle

    blob = cloudpickle.dumps(thing)
    pickle.loads(blob)
    return _ByValue(blob, note)


def _opened(blob: bytes, note: str) -> Any:
    thing = pickle.loads(blob)
    if note:
        thing.add_note(note)
    return thing


def _name(clients: Sequence[int] | None) -> str:
    if clients is None:
        return "worker"
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"
