"""What the ServerApp takes of a reply before anybody looks at it: no more than an answer can be, and no longer than one
may take. One that cannot be put together is the failure of who sent it, not of those whose replies came with it.

Flower pulls all pieces that a reply names, however many and large, waits over an hour for one that does not come, and
lets an error in the making of a message end the call, with all messages that were pulled by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid import http_grid

MARK = "fedsim does not read it: "  # in the reason of an error that stands for a reply
SMALL = 256 << 20  # bytes that any reply may have
PIECES = 100_000  # in a reply, at most; Flower cuts arrays into pieces of 5 MB
TURN = 16  # pieces pulled between looks


@dataclass
class Taking:
    """``most()``: bytes of a reply, at most, if it has more than ``SMALL``; ``seconds`` for all its pieces."""

    seconds: float | None = None
    most: Callable[[], float] = lambda: 0.0
    _whole: dict[str, InflatableObject] = field(default_factory=dict)

    def begin(self) -> None:
        """Flower's grid of this process pulls like this from now on."""
        grid: Any = http_grid
        grid.pull_objects, grid.inflate_object_from_contents = self.pulled, self.whole

    def pulled(
        self, object_ids: list[str], pull_object_fn: Callable[[str], bytes], **more: Any
    ) -> dict[str, bytes]:
        """In the place of Flower's ``pull_objects``, where an ``ObjectPullError`` stands for this one reply."""
        self._whole.clear()  # one that was asked for by another name than its own
        root, found, came = object_ids[-1], dict[str, bytes](), 0
        end = float("inf") if self.seconds is None else time.monotonic() + self.seconds
        if len(object_ids) > PIECES:
            raise _unread(root, f"it has {len(object_ids)} pieces, at most {PIECES} are taken")
        for at in range(0, len(object_ids), TURN):
            if (left := end - time.monotonic()) <= 0:
                raise _unread(root, f"it did not come within engine.deadline={self.seconds:g} s")
            limit: dict[str, Any] = {} if self.seconds is None else {"max_time": left}
            part = pull_objects(object_ids[at : at + TURN], pull_object_fn, **limit, **more)
            came += sum(map(len, part.values()))
            found |= part
            if came > SMALL and came > (most := max(self.most(), SMALL)):
                raise _unread(root, f"it has over {most / 1e6:.0f} MB, more than any answer to the question")
        try:
            self._whole[root] = inflate_object_from_contents(root, found)
        except Exception as error:  # of whatever somebody made up
            raise _unread(root, f"{type(error).__name__}: {error}") from None
        return found

    def whole(self, object_id: str, object_contents: dict[str, bytes], **more: Any) -> InflatableObject:
        """In the place of Flower's ``inflate_object_from_contents``: what was made when it was pulled."""
        return self._whole.pop(object_id)


def unread(reason: str) -> str:
    """Why :class:`Taking` did not read a reply, of the reason in an error; nothing if it is another one's."""
    return reason.partition(MARK)[2]


def _unread(root: str, why: str) -> ObjectPullError:
    return ObjectPullError(root, MARK + why)
