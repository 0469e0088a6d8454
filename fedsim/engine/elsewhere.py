"""Finds out once whether a client's code keeps something where ``Watch`` does not look at every job: in closures,
defaults, attributes of functions, generators, iterators and objects among the globals, in functions that it calls."""

from __future__ import annotations

from fedsim.engine.watch import KeptError, refusal
from fedsim.task.outside import changed, noted, users


class Elsewhere:
    """What the code of ``client`` looks up, as it was after ``setup``; compared once, after the first job."""

    def __init__(self, client: object):
        self._kinds = users(
            [type(client), *(type(inner) for inner in getattr(client, "__dict__", {}).values())]
        )
        self._before = noted(self._kinds)

    def check(self, number: int, round: int) -> None:
        """After a job of client ``number`` in ``round`` (from 0).

        Raises:
            KeptError: naming what has changed.
        """
        kinds, self._kinds = self._kinds, []
        if kinds and (name := changed(self._before, noted(kinds))) is not None:
            raise KeptError(refusal(name, number, round))
