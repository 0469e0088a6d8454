"""The worker's side of the transport."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fedsim.engine.ray.transport.memory import OpenBlocks
from fedsim.engine.ray.transport.pipe import Offer, Request, Response, WorkerEnd
from fedsim.errors import EngineError


class Receiver:
    """Makes the calls that reach a worker: ``run(method, shared, item)``, with the values of what calls share.

    A shared value is read once for all calls in a row that have it in the same place.
    """

    def __init__(self, run: Callable[[str, list[Any], Any], Any]):
        self._run = run
        self._blocks = OpenBlocks()
        self._shared: dict[int, tuple[int, Any]] = {}  # by place among the shared: number and value
        self._pipe: WorkerEnd | None = None

    def accept(self, offer: Offer | None) -> bool:
        """Be called by pipe, where this is the driver's machine; whether it is. ``serve`` makes the calls."""
        try:
            self._pipe = None if offer is None else WorkerEnd(offer)
        except OSError:
            self._pipe = None
        return self._pipe is not None

    def serve(self) -> None:
        """Make the calls that come by pipe until that ends; returns at once where there is none."""
        if (pipe := self._pipe) is None:
            return
        try:
            while (request := pipe.next()) is not None:
                pipe.answer(self._respond(request))
        finally:
            pipe.close()

    def call(
        self, method: str, shared: Sequence[tuple[int, Any]], item: Any, read: Callable[[Any], Any]
    ) -> Any:
        """Make one call; ``shared`` are numbers, each with what ``read`` turns into the value."""
        for place, (number, where) in enumerate(shared):
            if place not in self._shared or self._shared[place][0] != number:
                self._shared[place] = number, read(where)
        return self._run(method, [self._shared[place][1] for place in range(len(shared))], item)

    def _respond(self, request: Request) -> Response:
        read = self._blocks.read
        try:
            result = self.call(request.method, request.shared, read(request.item), read)
            return Response(request.number, self._blocks[request.result].write(result))
        except Exception as e:
            return Response(request.number, None, _portable(e))


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note; if it cannot travel, one that says the same."""
    text = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"in a worker: {text}")
    copy.add_note(f"In a worker:\n{text}")
    return copy
