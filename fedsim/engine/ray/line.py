"""A line to a worker of this machine: a pipe for calls and one for answers, which carry nothing but mail.

A call through Ray wakes several processes and takes half a millisecond of each; at the size of common models that is
what a client's training takes. So Ray starts, restarts and ends the workers, and the calls between go by line. Where
the other side dies, the line ends: that is noticed at once.
"""

from __future__ import annotations

import os
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from fedsim.engine.ray.mail import Mail, Place
from fedsim.errors import EngineError

Shared = list[tuple[int, Any]]  # what calls have in common: numbers, and where each part lies


class Ends(NamedTuple):
    """Where a worker finds its ends: descriptors of the driver, which it opens again."""

    pid: int
    calls: int
    answers: int


class Call(NamedTuple):
    """A method of the worker, what it is called with, and where the result is to be written."""

    number: int
    method: str
    shared: Shared
    item: tuple[Place, Mail]
    out: Place


class Answer(NamedTuple):
    """The mail that holds a call's result, or what the call raised."""

    number: int
    mail: Mail | None
    error: Exception | None = None


class Line:
    """The driver's side."""

    def __init__(self) -> None:
        theirs, calls = os.pipe()
        answers, theirs_too = os.pipe()
        self._calls, self.answers = Connection(calls, readable=False), Connection(answers, writable=False)
        self._theirs = [Connection(theirs, writable=False), Connection(theirs_too, readable=False)]
        self.ends = Ends(os.getpid(), theirs, theirs_too)

    def established(self) -> None:
        """The worker has opened its ends: with nobody else holding them, its death ends the line."""
        for end in self._theirs:
            end.close()
        self._theirs = []

    def send(self, call: Call) -> None:
        """Start a call, without waiting: a pipe holds many bounded mails. Raises ``OSError`` at the line's end."""
        self._calls.send_bytes(pickle.dumps(call))

    def receive(self) -> Answer:
        """The next answer. Raises ``OSError`` or ``EOFError`` at the line's end."""
        answer: Answer = pickle.loads(self.answers.recv_bytes())
        return answer

    def close(self) -> None:
        """End the line; the worker stops listening after its present call."""
        for end in (self._calls, self.answers, *self._theirs):
            end.close()


class Listener:
    """The worker's side."""

    def __init__(self, ends: Ends):
        theirs = f"/proc/{ends.pid}/fd"
        self._calls = Connection(os.open(f"{theirs}/{ends.calls}", os.O_RDONLY), writable=False)
        self._answers = Connection(os.open(f"{theirs}/{ends.answers}", os.O_WRONLY), readable=False)

    def next(self) -> Call | None:
        """The next call; ``None`` at the line's end."""
        try:
            call: Call = pickle.loads(self._calls.recv_bytes())
        except (EOFError, OSError):
            return None
        return call

    def answer(self, number: int, mail: Mail | None, error: Exception | None = None) -> None:
        """Answer a call; nothing happens where nobody listens any more."""
        try:
            self._answers.send_bytes(pickle.dumps(Answer(number, mail, error and _portable(error))))
        except OSError:
            return

    def close(self) -> None:
        """Hang up."""
        self._calls.close()
        self._answers.close()


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note; if it cannot travel, one that says the same."""
    text = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"in a worker: {text}")
    copy.add_note(f"In a worker:\n{text}")
    return copy
