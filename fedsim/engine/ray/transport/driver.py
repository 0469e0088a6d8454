"""The driver's side of the transport: open a worker, send it calls, take up what comes back."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from fedsim.engine.ray.transport.memory import SUPPORTED, Block, FreeBlocks, Packed
from fedsim.engine.ray.transport.pipe import DriverEnd, Offer, Request

POLL = 0.002  # seconds between looks at either kind of worker, where both are at work
_numbers = itertools.count()


class NotReady(Exception):  # noqa: N818
    """The worker was restarted and has not received its plan yet."""


class Shared:
    """A value that many calls read: written, or put into the object store, once and only where somebody needs it there.

    Its block is used again when neither the caller nor a call in progress holds this object any more.
    """

    def __init__(self, value: Any):
        self.value, self.number = value, next(_numbers)
        self._packed: Packed | None = None
        self._stored: Any = None

    def packed(self, blocks: FreeBlocks) -> tuple[int, Packed]:
        """The number, by which a worker knows what it has read already, and the value in memory."""
        if self._packed is None:
            block = blocks.take()
            self._packed = block.write(self.value)
            weakref.finalize(self, blocks.give, block).atexit = False
        return self.number, self._packed

    def stored(self, ray: Any) -> tuple[int, Any]:
        """The number, and the value in Ray's object store."""
        self._stored = self._stored or ray.put(self.value)
        return self.number, self._stored


class Found(NamedTuple):
    """A call is done; ``read`` gives its result, or raises what it raised."""

    call: int
    read: Callable[[], Any]


class Lost(NamedTuple):
    """A worker that died, or was restarted and knows nothing: its calls are to be made again."""

    worker: Any


class _Pending(NamedTuple):
    """A call in progress, and what it holds until it is done."""

    worker: Any
    shared: Sequence[Shared]
    blocks: tuple[Block, ...] = ()  # of its item and its result, where it went by pipe


class Transport:
    """Calls to workers, each by the shortest way: by pipe within this machine, through ``ray`` elsewhere.

    A worker is anything hashable; one that is called through Ray is an actor with a method ``call(method, shared,
    item)``, where ``shared`` are numbers with references to the values.
    """

    def __init__(self, ray: Any = None):
        self._ray, self._blocks = ray, FreeBlocks()
        self._proof = Block() if SUPPORTED else None
        self._pipes: dict[Any, DriverEnd] = {}
        self._local: dict[int, _Pending] = {}
        self._remote: dict[Any, tuple[int, _Pending]] = {}  # by Ray's reference to the result

    def open(self, worker: Any) -> Offer | None:
        """What ``worker`` may accept; if it has not when it is first called, it is called through Ray."""
        self.close(worker)
        if self._proof is None:
            return None
        self._pipes[worker] = pipe = DriverEnd(self._proof.address)
        return pipe.offer

    def accepted(self, worker: Any, timeout: float) -> bool:
        """Whether ``worker`` accepts what it was offered within ``timeout`` seconds."""
        pipe = self._pipes[worker]
        return bool(wait([pipe.responses], timeout)) and pipe.accepted()

    def leave(self) -> None:
        """In a forked process, which holds copies of the driver's ends: close them, or no pipe would end."""
        for pipe in self._pipes.values():
            pipe.close()

    def send(self, worker: Any, method: str, shared: Sequence[Shared], item: Any) -> int:
        """Start the call ``method(*shared, item)``; the number under which it will be ``Found``."""
        number, pipe = next(_numbers), self._pipes.get(worker)
        if pipe is not None and not pipe.accepted():
            self.close(worker)
            pipe = None
        if pipe is None:
            result = worker.call.remote(method, [s.stored(self._ray) for s in shared], item)
            self._remote[result] = number, _Pending(worker, shared)
            return number
        inward, outward = self._blocks.take(), self._blocks.take()
        values = [s.packed(self._blocks) for s in shared]
        request = Request(number, method, values, inward.write(item), outward.address)
        self._local[number] = _Pending(worker, shared, (inward, outward))
        with contextlib.suppress(OSError):  # it died: `next` finds the pipe's end
            pipe.send(request)
        return number

    def next(self, timeout: float | None = None) -> Found | Lost | None:
        """What comes first, a call that is done or a loss; ``None`` after ``timeout`` seconds."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            left = max(0.0, end - time.monotonic())
            pause = POLL if self._local and self._remote else None if left == float("inf") else left
            if self._local:
                pipes: dict[Any, Any] = {
                    self._pipes[p.worker].responses: p.worker for p in self._local.values()
                }
                if ready := wait(list(pipes), pause):
                    return self._by_pipe(pipes[ready[0]])
            if self._remote:
                done, _ = self._ray.wait(list(self._remote), timeout=0 if self._local else pause)
                if done:
                    return self._through_ray(done[0])
            if not left:
                return None

    def close(self, worker: Any) -> bool:
        """Forget ``worker``; whether calls to it were in progress.

        It may still write to their blocks, so these are not used again.
        """
        if (pipe := self._pipes.pop(worker, None)) is not None:
            pipe.close()
        calls = len(self._local) + len(self._remote)
        self._local = {n: p for n, p in self._local.items() if p.worker != worker}
        self._remote = {r: (n, p) for r, (n, p) in self._remote.items() if p.worker != worker}
        return len(self._local) + len(self._remote) < calls

    def _by_pipe(self, worker: Any) -> Found | Lost:
        try:
            number, packed, error = self._pipes[worker].receive()
        except (EOFError, OSError):
            return self._lose(worker)
        inward, outward = self._local.pop(number).blocks
        give = self._blocks.give
        give(inward)
        if packed is None:
            give(outward)
            return Found(number, lambda: _raise(error))
        return Found(number, lambda: outward.read(packed, done=lambda: give(outward)))

    def _through_ray(self, result: Any) -> Found | Lost:
        number, pending = self._remote.pop(result)
        errors = self._ray.exceptions
        try:
            value = self._ray.get(result)
        except errors.RayActorError:
            return self._lose(pending.worker)
        except errors.RayTaskError as e:
            if isinstance(e.cause, NotReady):
                return self._lose(pending.worker)
            error = e.as_instanceof_cause()
            return Found(number, lambda: _raise(error))
        return Found(number, lambda: value)

    def _lose(self, worker: Any) -> Lost:
        self.close(worker)
        return Lost(worker)


def _raise(error: BaseException | None) -> Any:
    assert error is not None
    raise error from None
