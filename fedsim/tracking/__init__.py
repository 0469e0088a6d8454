"""Trackers: who is told about a run. ``build`` makes the configured ones and keeps their failures apart."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import CallbackError, ConfigError, check_choice
from fedsim.tracking.base import Row, RunInfo, Tracker
from fedsim.tracking.callbacks import takes_info
from fedsim.tracking.information import Callback, Copies, Ending, RoundInfo, copied
from fedsim.tracking.jsonl import JsonlTracker, read_rows

if TYPE_CHECKING:
    from fedsim.config.schema import TrackerConfig

__all__ = ["Callback", "Ending", "RoundInfo", "Row", "RunInfo", "Tracker", "Trackers", "build", "read_rows"]

log = logging.getLogger(__name__)

CONSOLE_MODES = ("auto", "rich", "plain", "quiet")
SHOWN = ("all", "validation")
WANDB_MODES = ("disabled", "auto", "offline", "online")


class Trackers(Tracker):
    """Passes every hook on to ``trackers``, then ``callbacks``: objects with any of the hooks of :class:`Tracker` or of
    :class:`Callback`, which are told apart by the arguments of ``round``.

    A tracker that raises is reported once and gets no further calls; the run goes on. Two exceptions: a
    ``ConfigError`` raised by ``start`` ends the run before its first round (the trackers already started
    see ``end`` with status "failed"), and the JSONL record is never switched off: each of its failures is
    logged as an error, and it tries again at the next round.

    What one of the user's ``callbacks`` raises ends the run, as a ``CallbackError`` caused by it; at the ``end`` of a
    run that has failed already it is only reported.
    """

    def __init__(self, trackers: Iterable[object], callbacks: Iterable[object] = ()) -> None:
        self.callbacks = list(callbacks)
        self.trackers = [*trackers, *self.callbacks]
        self._with_models = [c for c in self.callbacks if takes_info(c)]
        self._last: RoundInfo | None = None  # for callbacks that ask for models at the end
        self._open = False
        self._at = "while the run was set up"

    def start(self, run: RunInfo) -> None:
        """Start all; raises ``ConfigError`` if one of them cannot do what the configuration demands."""
        self._open = True
        for started, tracker in enumerate(list(self.trackers)):
            try:
                self._call(tracker, "start", run)
            except ConfigError as error:
                del self.trackers[started:]
                self.end({"status": "failed", "error": str(error)})
                raise

    def phase(self, text: str) -> None:
        """Pass a stage on; may come before ``start``."""
        self._open = True
        self._all("phase", text)

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Pass a round on."""
        self._at = f"in round {row.get('round')}"
        for tracker in list(self.trackers):
            if not any(tracker is callback for callback in self._with_models):
                if any(
                    tracker is callback for callback in self.callbacks
                ):  # may keep or change what it is told
                    self._call(tracker, "round", copied(row), Copies(clients))
                else:
                    self._call(tracker, "round", row, clients)

    def informed(self, info: RoundInfo) -> None:
        """Tell callbacks of a finished round, with its models."""
        if not self.callbacks:
            return
        self._last, info.row, info.clients = info, copied(info.row), Copies(info.clients)
        held = [(name, t, t._version) for name, pair in info.models.items() for t in pair]
        for callback in self.callbacks:
            if info.measured:
                self._call(callback, "evaluated", info)
            if any(callback is other for other in self._with_models):
                self._call(callback, "round", info)
            if written := next((name for name, t, version in held if t._version != version), None):
                raise CallbackError(
                    f"the callback {type(callback).__name__} wrote to info.models[{written!r}] {self._at}, which the "
                    "run goes on with; work on a .clone(), or on info.weights, a copy"
                )

    def flush(self) -> None:
        """See that all rows so far are in the run's record; ``OSError`` if they cannot be written."""
        for tracker in self.trackers:
            if isinstance(tracker, JsonlTracker):
                tracker.flush()

    def end(self, summary: Row) -> None:
        """Pass the end on; a second call does nothing, so every way out of a run may call it."""
        if self._open:
            self._open, self._at = False, "as the run ended"
            failures: list[CallbackError] = []
            for tracker in list(self.trackers):  # all of them are to hear of it
                try:
                    mine = any(tracker is callback for callback in self.callbacks)
                    self._call(tracker, "end", Ending(copied(summary), self._last) if mine else summary)
                except CallbackError as error:
                    failures.append(error)
            for failure in failures:
                if summary.get("status", "done") == "done":
                    raise failure
                log.warning("%s", failure, exc_info=failure.__cause__)

    def _all(self, hook: str, *args: Any) -> None:
        for tracker in list(self.trackers):
            self._call(tracker, hook, *args)

    def _call(self, tracker: object, hook: str, *args: Any) -> None:
        method = getattr(tracker, hook, None)
        if method is None:
            return
        try:
            found = method(*args)
            if found is not None and isinstance(args[0], RoundInfo):
                raise TypeError(f'it returned {found!r}; to end the run call info.stop("why")')
        except Exception as error:
            if hook == "start" and isinstance(error, ConfigError):
                raise
            if any(tracker is callback for callback in self.callbacks):
                what = f"{type(error).__name__}: {error}"
                raise CallbackError(
                    f"the callback {type(tracker).__name__}.{hook} failed {self._at}: {what}"
                ) from error
            self._report(tracker, hook, error)

    def _report(self, tracker: object, hook: str, error: Exception) -> None:
        what = f"{type(tracker).__name__}.{hook}: {type(error).__name__}: {error}"
        if isinstance(tracker, JsonlTracker):
            log.error(
                "the run's record is NOT being written: %s. Free disk space or fix the folder's rights; "
                "rows that wait are written at the next round",
                what,
            )
            return
        self.trackers = [other for other in self.trackers if other is not tracker]
        log.warning(
            "tracker switched off, the run goes on: %s. Its output ends here, metrics.jsonl is complete. "
            "Fix the cause, or leave this tracker out of the configuration",
            what,
        )
        log.debug("traceback of the tracker", exc_info=error)


def build(config: TrackerConfig, extra: Iterable[object] = ()) -> Trackers:
    """The configured trackers, then ``extra`` callbacks: objects with any of the hooks of :class:`Tracker`.

    ``config`` is a ``TrackerConfig`` or a node with its keys. Raises ``ConfigError`` for an unknown mode.
    """
    from fedsim.tracking.console import ConsoleTracker

    check_choice("tracker.console.mode", config.console.mode, CONSOLE_MODES)
    check_choice("tracker.console.shows", config.console.shows, SHOWN)
    check_choice("tracker.wandb.mode", config.wandb.mode, WANDB_MODES)
    trackers: list[object] = [ConsoleTracker(config.console.mode, shows=config.console.shows), JsonlTracker()]
    if config.wandb.mode != "disabled":
        from fedsim.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(config.wandb.mode, config.wandb.project, config.wandb.entity))
    if config.tensorboard:
        from fedsim.tracking.tensorboard import TensorboardTracker

        trackers.append(TensorboardTracker())
    if config.prometheus:
        from fedsim.tracking.prometheus import PrometheusTracker

        trackers.append(PrometheusTracker(Path(config.prometheus).expanduser()))
    return Trackers(trackers, extra)
