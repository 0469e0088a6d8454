"""The two pipes between the driver and a worker of its machine: one for requests, one for responses.

A call through Ray wakes several processes and takes half a millisecond of each; at the size of common models that is
what a client's training takes. So Ray starts, restarts and ends the workers, and the calls between go by pipe. Where
the other side dies, the pipe ends: that is noticed at once.
"""

from __future__ import annotations

import os
import pickle
from multiprocessing.connection import Connection
from typing import NamedTuple

from fedsim.engine.ray.transport.memory import Address, Packed


class Offer(NamedTuple):
    """What a worker needs to be called by pipe: descriptors of the driver, which it opens again.

    A block of the driver's memory comes with them: who can open that is on the same machine.
    """

    memory: Address
    requests: int
    responses: int


class Request(NamedTuple):
    """A call: the method, its shared values (each under a number), its item, and where the result is to be written."""

    number: int
    method: str
    shared: list[tuple[int, Packed]]
    item: Packed
    result: Address


class Response(NamedTuple):
    """The result of the call ``number``, or what it raised."""

    number: int
    result: Packed | None
    error: Exception | None = None


class DriverEnd:
    """The driver's side."""

    def __init__(self, memory: Address) -> None:
        theirs, requests = os.pipe()
        responses, theirs_too = os.pipe()
        self._requests = Connection(requests, readable=False)
        self.responses = Connection(responses, writable=False)
        self._theirs = [Connection(theirs, writable=False), Connection(theirs_too, readable=False)]
        self.offer = Offer(memory, theirs, theirs_too)

    def accepted(self) -> bool:
        """Whether the worker has opened its ends. Nobody else holds them then, so that its death ends the pipes."""
        if self._theirs and self.responses.poll():
            self.responses.recv_bytes()
            for end in self._theirs:
                end.close()
            self._theirs = []
        return not self._theirs

    def send(self, request: Request) -> None:
        """Start a call, without waiting: a pipe holds several small requests. Raises ``OSError`` at its end."""
        self._requests.send_bytes(pickle.dumps(request))

    def receive(self) -> Response:
        """The next response. Raises ``OSError`` or ``EOFError`` at the pipe's end."""
        response: Response = pickle.loads(self.responses.recv_bytes())
        return response

    def close(self) -> None:
        """End both pipes; the worker ends after the calls that it has received."""
        for end in (self._requests, self.responses, *self._theirs):
            end.close()


class WorkerEnd:
    """The worker's side. Raises ``OSError`` on another machine than the driver's."""

    def __init__(self, offer: Offer):
        os.close(offer.memory.open())
        theirs = f"/proc/{offer.memory.pid}/fd"
        self._requests = Connection(os.open(f"{theirs}/{offer.requests}", os.O_RDONLY), writable=False)
        self._responses = Connection(os.open(f"{theirs}/{offer.responses}", os.O_WRONLY), readable=False)
        self._responses.send_bytes(b"accepted")

    def next(self) -> Request | None:
        """The next request; ``None`` at the pipe's end."""
        try:
            request: Request = pickle.loads(self._requests.recv_bytes())
        except (EOFError, OSError):
            return None
        return request

    def answer(self, response: Response) -> None:
        """Answer a request; nothing happens where nobody listens any more."""
        try:
            self._responses.send_bytes(pickle.dumps(response))
        except OSError:
            return

    def close(self) -> None:
        """End both pipes."""
        self._requests.close()
        self._responses.close()
