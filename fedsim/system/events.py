"""Events in order of virtual time: what asynchronous servers and peers wait on. Nothing here sleeps."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that happens at `time` (virtual seconds or ticks); `sequence` breaks ties: first come, first served."""

    time: float
    sequence: int
    kind: str
    client: int
    data: tuple[Any, ...] = ()


class EventQueue:
    """A heap of events keyed by (time, sequence): its order never depends on how fast anything was computed.

    ``now`` is the time of the last event taken. ``items()`` are plain tuples for a checkpoint, in order; a queue made
    from them goes on exactly where the first one stood.
    """

    def __init__(self, items: Iterable[tuple[Any, ...]] = (), *, now: float = 0.0, sequence: int = 0):
        self.heap = [Event(*item) for item in items]
        heapq.heapify(self.heap)
        self.now, self.sequence = now, sequence

    def push(self, time: float, kind: str, client: int, *data: Any) -> Event:
        """Add an event; ValueError when it would lie in the past (or its time is not a number)."""
        if not time >= self.now:
            raise ValueError(
                f"an event of client {client} at time {time} lies before the clock, which stands at {self.now}"
            )
        event = Event(float(time), self.sequence, kind, client, data)
        self.sequence += 1
        heapq.heappush(self.heap, event)
        return event

    def pop(self) -> Event:
        """Take the earliest event and move the clock to it; IndexError when there is none."""
        event = heapq.heappop(self.heap)
        self.now = event.time
        return event

    def peek(self) -> Event | None:
        """The earliest event, left where it is; None when there is none."""
        return self.heap[0] if self.heap else None

    def items(self) -> list[tuple[Any, ...]]:
        """All waiting events as plain tuples, earliest first."""
        return [tuple(event) for event in sorted(self.heap, key=lambda event: event[:2])]

    def __len__(self) -> int:
        return len(self.heap)
