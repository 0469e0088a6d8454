"""How calls travel to Ray actors: by line and mail to those of this machine, through Ray and its store to others."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from fedsim.engine.ray.line import Call, Line
from fedsim.engine.ray.mail import Slot, Slots

POLL = 0.002  # seconds between looks at either kind of actor, where both are at work


class PostOffice:
    """What the exchanges of one engine have in common: slots, lines, and what stands over many exchanges."""

    def __init__(self, ray: Any):
        self.ray, self.slots, self.lines = ray, Slots(), dict[Any, Line]()
        self.probe = self.slots.probe()
        self.numbers = itertools.count()
        self._standing: Shared | None = None

    def exchange(self, method: str, value: Any) -> Exchange:
        """Calls of ``method`` that share ``value``; its part ``standing`` is sent only when it is another object."""
        standing = getattr(value, "standing", None)
        if standing is None:
            return Exchange(self, method, [self.share(value)])
        if self._standing is None or self._standing.value is not standing:
            self.forget()
            self._standing = self.share(standing)
        return Exchange(self, method, [self.share(replace(value, standing=None)), self._standing])

    def share(self, value: Any) -> Shared:
        """``value`` under a number of its own."""
        return Shared(self, next(self.numbers), value)

    def forget(self) -> None:
        """Drop what stands."""
        if self._standing is not None:
            self._standing.close()
        self._standing = None

    def connect(self, actor: Any, line: Line | None) -> None:
        """From now on ``actor`` is called by ``line``; through Ray without one."""
        if (old := self.lines.pop(actor, None)) is not None:
            old.close()
        if line is not None:
            self.lines[actor] = line

    def close(self) -> None:
        """Hang up on all actors."""
        for actor in list(self.lines):
            self.connect(actor, None)


class Shared:
    """A value that many calls read: written, or put into the object store, once and only if somebody needs it there."""

    def __init__(self, office: PostOffice, number: int, value: Any):
        self._office, self._number, self.value = office, number, value
        self._slot: Slot | None = None
        self._mailed: Any = None
        self._stored: Any = None

    def address(self, near: bool) -> tuple[int, Any]:
        """The number, by which a worker knows what it has read already, and where the value lies."""
        if not near:
            self._stored = self._stored or self._office.ray.put(self.value)
            return self._number, self._stored
        if self._slot is None:
            self._slot = self._office.slots.take()
            self._mailed = self._slot.place, self._slot.write(self.value)
        return self._number, self._mailed

    def close(self) -> None:
        """Nobody reads it any more."""
        if self._slot is not None:
            self._office.slots.give(self._slot)
            self._slot = None


class Lost(NamedTuple):
    """An actor that died, or was restarted and knows nothing: its calls are to be made again."""

    actor: Any


class Found(NamedTuple):
    """A call is done; ``read`` gives its result."""

    call: int
    read: Callable[[], Any]


class Exchange:
    """The calls of one ``map``."""

    def __init__(self, office: PostOffice, method: str, shared: list[Shared]):
        self._office, self._method, self._shared = office, method, shared
        self._lent: dict[
            int, tuple[Any, Slot, Slot]
        ] = {}  # calls by line: actor, and the item's and result's slots
        self._far: dict[Any, tuple[int, Any]] = {}  # calls through Ray: number and actor

    def send(self, actor: Any, item: Any) -> int:
        """Start the call; the number under which it will be ``Found``."""
        number, line, slots = next(self._office.numbers), self._office.lines.get(actor), self._office.slots
        shared = [s.address(line is not None) for s in self._shared]
        if line is None:
            self._far[actor.call.remote(self._method, shared, item)] = number, actor
            return number
        inward, outward = slots.take(), slots.take()
        self._lent[number] = actor, inward, outward
        where = inward.place, inward.write(item)
        with contextlib.suppress(OSError):  # it died: `next` finds the line's end
            line.send(Call(number, self._method, shared, where, outward.place))
        return number

    def next(self, timeout: float | None) -> Found | Lost | None:
        """What comes first, a result or a loss; ``None`` after ``timeout`` seconds. Raises what a call raised."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            lines: dict[Any, Any] = {self._office.lines[a].answers: a for a, *_ in self._lent.values()}
            left = end - time.monotonic()
            pause = POLL if lines and self._far else None if left == float("inf") else max(0.0, left)
            for source in wait(list(lines), pause) if lines else ():
                if (came := self._by_line(lines[source])) is not None:
                    return came
            if self._far:
                done, _ = self._office.ray.wait(list(self._far), num_returns=1, timeout=0 if lines else pause)
                if done:
                    return self._through_ray(done[0])
            if left <= 0:
                return None

    def _by_line(self, actor: Any) -> Found | Lost | None:
        try:
            number, mail, error = self._office.lines[actor].receive()
        except (EOFError, OSError):
            self._lent = {n: lent for n, lent in self._lent.items() if lent[0] is not actor}
            return Lost(actor)
        if number not in self._lent:  # of an exchange that was given up
            return None
        _, inward, outward = self._lent.pop(number)
        give = self._office.slots.give
        give(inward)
        if mail is None:
            give(outward)
            assert error is not None
            raise error
        return Found(number, lambda: outward.read(mail, done=lambda: give(outward)))

    def _through_ray(self, answer: Any) -> Found | Lost:
        number, actor = self._far.pop(answer)
        errors = self._office.ray.exceptions
        try:
            value = self._office.ray.get(answer)
            return Found(number, lambda: value)
        except errors.RayActorError:
            return self._lose(actor)
        except errors.RayTaskError as e:
            if isinstance(e.cause, NotReady):
                return self._lose(actor)
            raise e.as_instanceof_cause() from None

    def _lose(self, actor: Any) -> Lost:
        self._far = {answer: call for answer, call in self._far.items() if call[1] is not actor}
        return Lost(actor)

    def close(self) -> None:
        """All calls are done: what only they shared may be overwritten."""
        self._shared[0].close()


class NotReady(Exception):  # noqa: N818
    """The actor was restarted and has not received the plan yet."""
