"""Finds out once whether a client's code keeps something where ``Watch`` does not look at every job: in closures,
defaults, attributes of functions, generators, iterators and objects among the globals, in functions that it calls."""

from __future__ import annotations

import warnings

from fedsim.task.outside import changed, noted, users


class Elsewhere:
    """What the code of ``client`` looks up, as it was after ``setup``; compared once, after the first job."""

    def __init__(self, client: object):
        self._kinds = users(
            [type(client), *(type(inner) for inner in getattr(client, "__dict__", {}).values())]
        )
        self._before = noted(self._kinds)

    def check(self, number: int, round: int) -> None:
        """After a job of client ``number`` in ``round`` (from 0): a warning that names what has changed.

        It is no error, since a list that somebody looks at afterwards changes no result.
        """
        kinds, self._kinds = self._kinds, []
        if kinds and (name := changed(self._before, noted(kinds))) is not None:
            warnings.warn(
                f"client {number} in round {round + 1}: {name} has changed. Every worker has its own, and resumed runs "
                "begin anew: if training depends on it, results depend on the number of workers. Update.state keeps "
                "what a client needs in later rounds, Update.metrics reports numbers, job.rng(...) draws",
                stacklevel=2,
            )
