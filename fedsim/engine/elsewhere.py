"""Finds out now and then whether a client's code keeps something where ``Watch`` does not look at every job: in
closures, defaults, attributes of functions, generators, iterators and objects among the globals, in functions that it
calls, in other people's modules and classes.

The same of a model and its loss: what they change only now and then shows in no trial of two samples. Where something
has changed, or the code asks a clock, the job is done again: it must give the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.engine.watch import KeptError
from fedsim.task.outside import CACHE, changed, code_of, noted, users
from fedsim.task.task import Task
from fedsim.task.unseeded import clock, unseeded

FOR_CLIENTS = (
    "Update.state keeps what a client needs in later rounds, Update.metrics reports numbers, job.rng() draws"
)
FOR_MODELS = "An attribute of a layer (self.n) starts anew with each client, metrics= reports numbers"


@dataclass
class _Part:
    """Code whose surroundings are watched: what they were, which of them do not count, what to do instead."""

    things: list[Any]
    before: dict[str, bytes]
    but: Sequence[str]
    advice: str
    suspect: str  # what it asks that is never the same twice


class Elsewhere:
    """What the code of ``client``, and of the model and loss of ``task``, looks up, as it was after ``setup``; compared
    after the first job, the second, the fourth and so on, until something was said."""

    def __init__(self, client: object, task: Task, spaces: Sequence[type] = ()):
        """``spaces``: classes of ours that the code may reach."""
        self._jobs, self._spaces = 0, spaces
        inner = getattr(client, "__dict__", {}).values()
        own = users([type(client), *map(type, inner)])
        self._parts = [
            _Part(things, noted(things, spaces), but, advice, clock(things) or unseeded(things))
            for things, but, advice in (
                (own, (), FOR_CLIENTS),
                (code_of(task), task.habits.outside, FOR_MODELS),
            )
            if things
        ]

    def next(self) -> bool:
        """Counts a job, which begins; whether it is one to look at."""
        self._jobs += 1
        return bool(self._parts) and not self._jobs & (self._jobs - 1)

    def check(self, number: int, round: int, repeats: Callable[[], bool]) -> None:
        """After a job of client ``number`` in ``round`` (from 0): a warning that names what has changed.

        It is no error where the job ``repeats``, since a list that somebody looks at afterwards changes no result.

        Raises:
            KeptError: it does not; naming what takes part.
        """
        for part in list(self._parts):
            now = noted(part.things, self._spaces)
            name, part.before = changed(part.before, now, part.but), now
            if self._jobs > 1 and name is not None and name.startswith(CACHE):
                name = None
            if name is None and not (part.suspect and self._jobs == 1):
                continue
            if not repeats():
                seen = f"{name} has changed" if name else f"{part.suspect} is another each time"
                raise KeptError(
                    f"client {number} in round {round + 1}: the same job gives another update when it is done again, "
                    f"since {seen}. Results would depend on the number of workers, and would not repeat. {part.advice}"
                )
            if name is not None and not name.startswith(CACHE):
                self._parts.remove(part)
                warnings.warn(
                    f"client {number} in round {round + 1}: {name} has changed. Every worker has its own, and "
                    "resumed runs begin anew: if training depends on it, results depend on the number of workers. "
                    f"{part.advice}",
                    stacklevel=2,
                )
