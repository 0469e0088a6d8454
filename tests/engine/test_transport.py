"""The transport between two plain processes, without Ray."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.engine.ray.transport.driver import Found, Lost, Shared, Transport
from fedsim.engine.ray.transport.memory import IN_BAND, SUPPORTED, Block
from fedsim.engine.ray.transport.pipe import Offer
from fedsim.engine.ray.transport.receiver import Receiver
from fedsim.errors import ClientError, EngineError

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="no anonymous files here: workers are called through Ray"
)
SMALL, LARGE = 3, 100 * IN_BAND  # numbers in an array that travels in the pickle, and in one that does not
WAIT = 60.0  # seconds


class LocalError(Exception):
    """Cannot be built again from what it prints."""

    def __init__(self, who: str, what: str):
        super().__init__(f"{who}: {what}")


class Methods:
    """What the other process offers: each takes a list of shared values and an item."""

    def add(self, shared: list[Any], item: Tensor) -> dict[str, Any]:
        return {"sum": sum(shared) + item, "pid": os.getpid()}

    def where(self, shared: list[Any], item: int) -> list[int]:
        """Addresses of the shared arrays: the same as long as they are not read anew."""
        return [x.data_ptr() for x in shared]

    def descriptors(self, shared: list[Any], item: None) -> int:
        return descriptors()

    def refuse(self, shared: list[Any], client: int) -> None:
        raise ClientError(f"client {client} is ill")

    def fail(self, shared: list[Any], item: None) -> None:
        raise LocalError("somebody", "no way")

    def die(self, shared: list[Any], item: None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self, shared: list[Any], seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def nothing(self, shared: list[Any], item: Any) -> Any:
        return item


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def work(offer: Offer, answer: Any) -> None:
    """The other process."""
    torch.set_num_threads(1)
    methods = Methods()
    receiver = Receiver(lambda method, shared, item: getattr(methods, method)(shared, item))
    answer.put(receiver.accept(offer))
    receiver.serve()


class Workers:
    """Processes opened by one transport; the number of each is its name."""

    def __init__(self) -> None:
        self.transport, self.processes = Transport(), list[SpawnProcess]()

    def start(self) -> int:
        context, name = multiprocessing.get_context("spawn"), len(self.processes)
        answer = context.Queue()
        process = context.Process(target=work, args=(self.transport.open(name), answer), daemon=True)
        process.start()
        self.processes.append(process)
        assert answer.get(timeout=WAIT) is True
        return name

    def result(self, call: int) -> Any:
        """What ``call`` gave, which must be the next that comes."""
        came = self.transport.next(WAIT)
        assert isinstance(came, Found) and came.call == call
        return came.read()

    def ask(self, worker: int, method: str, shared: list[Shared], item: Any) -> Any:
        return self.result(self.transport.send(worker, method, shared, item))


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    for name, process in enumerate(workers.processes):
        workers.transport.close(name)
        process.join(WAIT)
        assert process.exitcode in (0, -signal.SIGKILL), "the pipe's end must end the process"


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All values that this process writes."""
    written, write = list[Any](), Block.write
    monkeypatch.setattr(Block, "write", lambda self, value: written.append(value) or write(self, value))
    return written


def test_calls_carry_arrays_of_any_size_and_write_the_message_once(
    workers: Workers, writes: list[Any]
) -> None:
    """Two workers, several calls in flight at each: all share one writing of the message."""
    both = [workers.start(), workers.start()]
    for size in (0, 1, SMALL, LARGE):
        writes.clear()
        message, items = torch.rand(size), [torch.full((size,), float(i)) for i in range(6)]
        shared = [Shared(message)]
        calls = {workers.transport.send(both[i % 2], "add", shared, x): i for i, x in enumerate(items)}
        pids = set()
        for _ in items:
            came = workers.transport.next(WAIT)
            assert isinstance(came, Found)
            answer = came.read()
            assert torch.equal(answer["sum"], message + items[calls.pop(came.call)])
            pids.add(answer["pid"])
        assert pids == {p.pid for p in workers.processes}
        assert sum(value is message for value in writes) == 1 and len(writes) == 1 + len(items)


def test_a_value_that_stands_is_written_and_read_once_over_many_exchanges(
    workers: Workers, writes: list[Any]
) -> None:
    worker, standing = workers.start(), Shared(torch.rand(LARGE))
    places = []
    for i in range(4):
        if i == 2:  # an exchange without it, in between
            workers.ask(worker, "where", [Shared(torch.rand(LARGE))], 0)
        places.append(workers.ask(worker, "where", [Shared(torch.rand(LARGE)), standing], i)[1])
    assert len(set(places)) == 1
    assert sum(value is standing.value for value in writes) == 1
    other = Shared(torch.rand(LARGE))
    assert workers.ask(worker, "where", [Shared(torch.rand(SMALL)), other], 0)[1] != places[0]
    assert sum(value is other.value for value in writes) == 1
    assert torch.equal(
        workers.ask(worker, "add", [Shared(torch.ones(LARGE)), other], 0)["sum"], other.value + 1
    )


def test_memory_is_used_again_and_does_not_grow(workers: Workers) -> None:
    worker = workers.start()

    def rounds(count: int) -> int:
        for i in range(count):
            shared = [Shared(torch.rand(LARGE))]
            calls = [workers.transport.send(worker, "add", shared, torch.rand(LARGE)) for _ in range(3)]
            for call in calls:
                assert workers.result(call)["sum"].shape == (LARGE,)
            if i % 2:
                with pytest.raises(ClientError):
                    workers.ask(worker, "refuse", shared, i)
                gc.collect()  # an exception and the frames that it passed hold each other
        return descriptors()

    here, there = rounds(3), workers.ask(worker, "descriptors", [], None)
    assert rounds(20) == here
    assert workers.ask(worker, "descriptors", [], None) == there


def test_an_answer_stays_as_it_is_while_somebody_holds_it(workers: Workers) -> None:
    worker = workers.start()
    kept, expected = [], []
    for i in range(6):
        x = torch.full((LARGE,), float(i))
        kept.append(workers.ask(worker, "nothing", [], x)[5:])
        expected.append(x[5:])
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_a_message_is_not_overwritten_while_a_call_reads_it(workers: Workers) -> None:
    """The caller drops the first message and sends another, while calls with the first are still queued."""
    worker = workers.start()
    send = workers.transport.send
    first = send(worker, "sleep", [], 0.3)
    second = send(worker, "add", [Shared(torch.full((LARGE,), 1.0))], 0.0)
    third = send(worker, "add", [Shared(torch.full((LARGE,), 2.0))], 0.0)
    assert workers.result(first) == 0.3
    assert workers.result(second)["sum"].unique().tolist() == [1.0]
    assert workers.result(third)["sum"].unique().tolist() == [2.0]


def test_errors_travel_with_their_traceback(workers: Workers) -> None:
    worker = workers.start()
    with pytest.raises(ClientError) as caught:
        workers.ask(worker, "refuse", [], 4)
    assert str(caught.value) == "client 4 is ill"
    (note,) = caught.value.__notes__
    assert note.startswith("In a worker:\nTraceback") and "test_transport.py" in note and "in refuse" in note


def test_an_error_that_cannot_travel_is_given_in_words(workers: Workers) -> None:
    worker = workers.start()
    with pytest.raises(EngineError, match="somebody: no way") as caught:
        workers.ask(worker, "fail", [], None)
    assert "LocalError" in str(caught.value)
    assert workers.ask(worker, "nothing", [], "still there") == "still there"


def test_what_a_call_returns_must_be_able_to_travel(workers: Workers) -> None:
    worker = workers.start()
    with pytest.raises(Exception, match="no_such_method") as caught:
        workers.ask(worker, "no_such_method", [], None)
    assert isinstance(caught.value, AttributeError)


def test_a_death_in_mid_call_is_found_at_once_and_the_others_go_on(workers: Workers) -> None:
    doomed, other = workers.start(), workers.start()
    send, come = workers.transport.send, workers.transport.next
    shared = [Shared(torch.rand(LARGE))]
    lost = [send(doomed, "die", shared, None), send(doomed, "add", shared, 1.0)]
    start = time.monotonic()
    assert come(WAIT) == Lost(doomed)
    assert time.monotonic() - start < WAIT / 4
    assert torch.equal(workers.ask(other, "add", shared, 1.0)["sum"], shared[0].value + 1)
    assert come(0.0) is None, f"calls {lost} are forgotten with their worker"


def test_a_worker_that_dies_while_idle_is_lost_with_its_next_call(workers: Workers) -> None:
    worker = workers.start()
    assert workers.ask(worker, "nothing", [], 1) == 1
    workers.processes[worker].kill()
    workers.processes[worker].join(WAIT)
    workers.transport.send(worker, "nothing", [], 2)
    assert workers.transport.next(WAIT) == Lost(worker)


def test_time_runs_out_and_closing_says_who_is_still_at_work(workers: Workers) -> None:
    slow, done = workers.start(), workers.start()
    assert workers.ask(done, "nothing", [], 1) == 1
    workers.transport.send(slow, "sleep", [], 1.0)
    start = time.monotonic()
    assert workers.transport.next(0.2) is None
    assert 0.2 <= time.monotonic() - start < 1
    assert workers.transport.close(slow) is True
    assert workers.transport.close(done) is False
    assert workers.transport.next(0.0) is None
