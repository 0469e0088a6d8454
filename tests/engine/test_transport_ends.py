"""The ends of the transport, each by itself, and workers that only Ray reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.engine.ray.transport.driver import Found, Lost, Shared, Transport
from fedsim.engine.ray.transport.memory import IN_BAND, SUPPORTED, Block
from fedsim.engine.ray.transport.pipe import DriverEnd, Request, Response, WorkerEnd
from fedsim.engine.ray.transport.receiver import Receiver

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="no anonymous files here: workers are called through Ray"
)
SMALL, LARGE = 3, 100 * IN_BAND  # numbers in an array that travels in the pickle, and in one that does not
WAIT = 60.0  # seconds


class Actor:
    """Stands in for a Ray actor: ``call.remote`` notes what it is called with."""

    def __init__(self) -> None:
        self.call, self.called = self, list[Any]()

    def remote(self, *call: Any) -> str:
        self.called.append(call)
        return f"result {len(self.called)}"


class Store:
    """Stands in for Ray: what is put is found again, results are there when asked for."""

    class exceptions:  # noqa: N801
        RayActorError, RayTaskError = ConnectionError, ArithmeticError

    def __init__(self) -> None:
        self.stored: list[Any] = []

    def put(self, value: Any) -> str:
        self.stored.append(value)
        return f"stored {len(self.stored)}"

    def wait(self, results: list[str], timeout: float | None) -> tuple[list[str], list[str]]:
        return results[:1], results[1:]

    def get(self, result: str) -> Any:
        if result == "result 3":
            raise ConnectionError
        return f"value of {result}"


def test_a_worker_that_cannot_accept_is_called_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine: it has no such file. The message is put into the store once, a death there is a loss too."""
    store, actor = Store(), Actor()
    transport = Transport(store)
    offer = transport.open(actor)
    assert offer is not None
    elsewhere = offer._replace(memory=offer.memory._replace(name="other"))
    assert Receiver(lambda *call: None).accept(elsewhere) is False
    assert Receiver(lambda *call: None).accept(None) is False

    message = Shared(torch.rand(LARGE))
    calls = [transport.send(actor, "add", [message], i) for i in range(2)]
    assert store.stored == [message.value]
    assert actor.called == [("add", [(message.number, "stored 1")], i) for i in range(2)]
    for i, call in enumerate(calls):
        came = transport.next(WAIT)
        assert isinstance(came, Found) and (came.call, came.read()) == (call, f"value of result {i + 1}")
    transport.send(actor, "add", [message], 2)
    transport.send(actor, "add", [message], 3)
    assert transport.next(WAIT) == Lost(actor)
    assert transport.next(0.0) is None


def test_each_side_notices_the_end_of_the_other() -> None:
    memory = Block()

    def pair() -> tuple[DriverEnd, WorkerEnd]:
        driver = DriverEnd(memory.address)
        assert not driver.accepted()
        worker = WorkerEnd(driver.offer)
        assert driver.accepted()
        return driver, worker

    packed = memory.write("x")
    driver, worker = pair()
    requests = [Request(n, "run", [(7, packed)], packed, memory.address) for n in range(3)]
    for request in requests:
        driver.send(request)
    assert [worker.next() for _ in requests] == requests
    for n in range(3):
        worker.answer(Response(n, packed))
    assert [driver.receive() for _ in range(3)] == [(n, packed, None) for n in range(3)]
    driver.close()
    assert worker.next() is None
    worker.answer(Response(1, packed))  # nobody listens: no error

    driver, worker = pair()
    worker.close()
    with pytest.raises((EOFError, OSError)):
        driver.receive()
    with pytest.raises(OSError):
        driver.send(requests[0])
