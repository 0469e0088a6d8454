"""How calls travel to Ray actors: by mail to those of this machine, through Ray's object store to others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from fedsim.engine.mail import Slot, Slots


class PostOffice:
    """What the exchanges of one engine have in common: slots, who is near, and what stands over many exchanges."""

    def __init__(self, ray: Any):
        self.ray, self.slots, self.near = ray, Slots(), set[Any]()
        self.probe = self.slots.probe()
        self._numbers = itertools.count()
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
        return Shared(self, next(self._numbers), value)

    def forget(self) -> None:
        """Drop what stands."""
        if self._standing is not None:
            self._standing.close()
        self._standing = None


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


class Exchange:
    """The calls of one ``map``."""

    def __init__(self, office: PostOffice, method: str, shared: list[Shared]):
        self._office, self._method, self._shared = office, method, shared
        self._lent: dict[Any, tuple[Slot, Slot]] = {}  # of calls under way: the item's and the result's

    def send(self, actor: Any, item: Any) -> Any:
        """Start the call; what Ray will answer with."""
        near, slots = actor in self._office.near, self._office.slots
        shared = [s.address(near) for s in self._shared]
        if not near:
            return actor.call.remote(self._method, shared, item)
        inward, outward = slots.take(), slots.take()
        where = inward.place, inward.write(item)
        answer = actor.call_by_mail.remote(self._method, shared, where, outward.place)
        self._lent[answer] = inward, outward
        return answer

    def receive(self, answer: Any) -> Any:
        """The result of a finished call; raises what it raised."""
        if answer not in self._lent:
            return self._office.ray.get(answer)
        inward, outward = self._lent.pop(answer)
        give = self._office.slots.give
        give(inward)
        try:
            mail = self._office.ray.get(answer)
        except BaseException:
            give(outward)
            raise
        return outward.read(mail, done=lambda: give(outward))

    def close(self) -> None:
        """All calls are done: what only they shared may be overwritten."""
        self._shared[0].close()
