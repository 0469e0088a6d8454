"""Lines between the driver and a worker: order, errors, ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from fedsim.engine.ray.line import Call, Line, Listener
from fedsim.engine.ray.mail import POSSIBLE, Mail, Place
from fedsim.errors import ClientError, EngineError

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="no /proc here: workers are called through Ray")
NOWHERE = Place(0, 0, 0)


def call(number: int) -> Call:
    return Call(number, "run", [(7, None)], (NOWHERE, Mail(b"in")), NOWHERE)


@pytest.fixture
def pair() -> tuple[Line, Listener]:
    line = Line()
    listener = Listener(line.ends)
    line.established()
    return line, listener


def test_calls_and_answers_arrive_in_order(pair: tuple[Line, Listener]) -> None:
    line, listener = pair
    for number in range(3):
        line.send(call(number))
    for number in range(3):
        assert listener.next() == call(number)
        listener.answer(number, Mail(b"out", ((0, number),)))
    assert [line.receive() for _ in range(3)] == [(n, Mail(b"out", ((0, n),)), None) for n in range(3)]


def test_what_a_call_raises_travels_with_its_traceback(pair: tuple[Line, Listener]) -> None:
    line, listener = pair
    try:
        raise ClientError("client 4 is ill")
    except ClientError as e:
        listener.answer(1, None, e)
    error = line.receive().error
    assert isinstance(error, ClientError) and str(error) == "client 4 is ill"
    assert "test_line.py" in error.__notes__[0]


def test_an_error_that_cannot_travel_is_told_in_words(pair: tuple[Line, Listener]) -> None:
    line, listener = pair

    class LocalError(Exception):
        """Its class is unknown on the other side."""

    listener.answer(1, None, LocalError("no way"))
    error = line.receive().error
    assert isinstance(error, EngineError) and "no way" in str(error)


def test_each_side_notices_the_end_of_the_other(pair: tuple[Line, Listener]) -> None:
    line, listener = pair
    line.close()
    assert listener.next() is None
    listener.answer(1, Mail(b"too late"))  # nobody listens: no error

    line = Line()
    listener = Listener(line.ends)
    line.established()
    listener.close()
    with pytest.raises((EOFError, OSError)):
        line.receive()
    with pytest.raises(OSError):
        line.send(call(1))


def test_the_death_of_the_other_process_ends_the_line() -> None:
    line = Line()
    code = """
        import os, signal
        from fedsim.engine.ray.line import Ends, Listener
        listener = Listener(Ends(*map(int, os.environ["ENDS"].split())))
        print("open", flush=True)
        listener.next()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ends = " ".join(map(str, line.ends))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "ENDS": ends},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    line.established()
    line.send(call(1))
    with pytest.raises((EOFError, OSError)):
        line.receive()
    process.wait(30)
