"""What the ``system`` group says about a fleet, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedsim.errors import check_setting
from fedsim.system.availability import Availability
from fedsim.system.battery import Battery
from fedsim.system.devices import Fleet

_check = partial(check_setting, "system")

DeviceSource = Callable[[int, np.random.Generator], Fleet]


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Chances that a client is lost ``before``, ``during`` or ``after`` its work (before its answer got through)."""

    before: float
    during: float
    after: float

    def __post_init__(self) -> None:
        for name in ("before", "during", "after"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"dropout.{name}", value, "must be in [0, 1)")

    def __bool__(self) -> bool:
        return bool(self.before or self.during or self.after)


@dataclass(frozen=True, kw_only=True)
class System:
    """A fleet of devices and how the server deals with its differences.

    ``work``: what a device's speed counts per second: ``samples`` (one forward and backward pass over a sample; a
    forward pass alone is a third of it) or ``flops`` (of the model, measured once). ``deadline``: seconds after which
    an exchange is over; ``stragglers``: ``wait`` for all, ``drop`` who misses the deadline, or take the ``partial``
    work that fits into it. ``over_selection``: so many times more clients are asked than needed, and the first to
    answer count. ``check_in``: only clients that are there are asked; otherwise those who are not are lost.
    ``idle``: seconds that a round costs in which nobody could be asked. ``battery``: how batteries are used, where
    devices have one.
    """

    devices: DeviceSource
    availability: Availability
    work: str
    dropout: Dropout
    deadline: float | None
    stragglers: str
    over_selection: float
    check_in: bool
    idle: float
    battery: Battery
    traces: str | None = None  # a folder that the other settings refer to

    def __post_init__(self) -> None:
        _check(self.work in ("samples", "flops"), "work", self.work, "choose samples or flops")
        choices = ("wait", "drop", "partial")
        _check(
            self.stragglers in choices, "stragglers", self.stragglers, f"choose one of {', '.join(choices)}"
        )
        for name, kind, typed in (
            ("dropout", Dropout, "dropout.before=0.1"),
            ("battery", Battery, "battery.threshold=0.2"),
        ):
            value = getattr(self, name)
            _check(isinstance(value, kind), name, value, f"has options of its own; type e.g. system.{typed}")
        _check(self.over_selection >= 1, "over_selection", self.over_selection, "must be at least 1")
        _check(self.idle > 0, "idle", self.idle, "must be positive, in seconds")
        if self.deadline is None:
            _check(
                self.stragglers != "partial",
                "stragglers",
                "partial",
                "needs system.deadline, in seconds of virtual time",
            )
            _check(
                self.stragglers == "wait" or self.over_selection > 1,
                "stragglers",
                "drop",
                "needs system.deadline, or system.over_selection above 1",
            )
        else:
            _check(self.deadline > 0, "deadline", self.deadline, "must be positive, in seconds")
            _check(
                self.stragglers != "wait",
                "deadline",
                self.deadline,
                "choose system.stragglers=drop or partial with it",
            )
        _check(
            self.over_selection == 1 or self.stragglers != "wait",
            "over_selection",
            self.over_selection,
            "choose system.stragglers=drop or partial with it: who comes too late is not waited for",
        )
