"""Finds out now and then whether a client's code keeps something where ``Watch`` does not look at every job: in
closures, defaults, attributes of functions, generators, iterators and objects among the globals, in functions that it
calls.

The same of a model and its loss: what they change only now and then shows in no trial of two samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fedsim.task.outside import changed, code_of, noted, users
from fedsim.task.task import Task

FOR_CLIENTS = (
    "Update.state keeps what a client needs in later rounds, Update.metrics reports numbers, job.rng() draws"
)
FOR_MODELS = "An attribute of a layer (self.n) starts anew with each client, metrics= reports numbers"


class Elsewhere:
    """What the code of ``client``, and of the model and loss of ``task``, looks up, as it was after ``setup``; compared
    after the first job, the second, the fourth and so on, until something was said."""

    def __init__(self, client: object, task: Task):
        self._jobs = 0
        inner = getattr(client, "__dict__", {}).values()
        self._watched: list[tuple[list[Any], dict[str, bytes], Sequence[str], str]] = []
        for things, said, advice in (
            (users([type(client), *map(type, inner)]), (), FOR_CLIENTS),
            (code_of(task), task.habits.outside, FOR_MODELS),
        ):
            if things:
                self._watched.append((things, noted(things), said, advice))

    def check(self, number: int, round: int) -> None:
        """After a job of client ``number`` in ``round`` (from 0): a warning that names what has changed.

        It is no error, since a list that somebody looks at afterwards changes no result.
        """
        self._jobs += 1
        if self._jobs & (self._jobs - 1):
            return
        for entry in list(self._watched):
            things, before, said, advice = entry
            if (name := changed(before, noted(things), said)) is not None:
                self._watched.remove(entry)
                warnings.warn(
                    f"client {number} in round {round + 1}: {name} has changed. Every worker has its own, and resumed "
                    f"runs begin anew: if training depends on it, results depend on the number of workers. {advice}",
                    stacklevel=2,
                )
