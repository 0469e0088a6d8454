"""How clients' own code fails and what it says, in process and on Ray."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from problems import hashes
from users import KEPT, TWO, Keeper, run

from clients.sgd import SGDClient
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job

# -- how it fails ---------------------------------------------------------------------------------------------------


class OutOfLuckError(Exception):
    """An error of the user's own."""

    def __init__(self, left: int):
        super().__init__(f"{left} left")
        self.left = left

    def __reduce__(self) -> Any:
        return OutOfLuckError, (self.left,)


class StubbornError(Exception):
    """One that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("stuck")
        self.hold = lambda: None

    def __reduce__(self) -> Any:
        raise TypeError("not me")


@dataclass(frozen=True)
class Raises(SGDClient):
    error: Callable[[], BaseException] = field(kw_only=True)

    def fit(self, job: Job) -> Update:
        if job.client == 1:
            clue = 42  # noqa: F841 - what a debugger would look for
            raise self.error()
        return super().fit(job)


def test_the_cause_is_the_original_and_a_post_mortem_stands_in_the_client() -> None:
    with pytest.raises(ClientError) as caught:
        run(Raises(weighting="samples", error=lambda: OutOfLuckError(3)))
    error = caught.value
    assert isinstance(error.__cause__, OutOfLuckError)
    assert error.__cause__.left == 3
    for found in (error, error.__cause__):
        frame = list(traceback.walk_tb(found.__traceback__))[-1][0]
        assert frame.f_code.co_name == "fit"
        assert frame.f_locals["clue"] == 42


def test_leaving_the_process_is_a_failure_of_that_client() -> None:
    leaves = Raises(weighting="samples", error=lambda: SystemExit(3))
    with pytest.raises(ClientError, match=r"client 1 failed in round 1(?s:.*)SystemExit: 3"):
        run(leaves)
    result = run(leaves, "failures.policy=skip")
    assert [[f["client"] for f in row["failures"]] for row in result.rows] == [[1], [1]]


# -- the same on workers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talks(SGDClient):
    def fit(self, job: Job) -> Update:
        print("a line", job.round)
        print("half ", end="")
        print("and half", file=sys.stdout)
        if job.client == 4:
            print("to stderr", file=sys.stderr)
        warnings.warn("careful", RuntimeWarning, stacklevel=1)
        return super().fit(job)


@pytest.mark.slow
def test_prints_and_warnings_of_clients_reach_the_driver(
    ray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second run has the workers of the first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(Talks(weighting="samples"), ray, TWO, "engine.chunks=3")
        out, err = capsys.readouterr()
        lines = [line for line in out.splitlines() if line.startswith("client ")]
        assert lines == [
            f"client {c}: {text}"
            for r in range(2)
            for c in range(6)
            for text in (f"a line {r}", "half and half")
        ]
        assert err.splitlines() == ["client 4: to stderr"] * 2
        (told,) = [w for w in caught if "careful" in str(w.message)]
        assert (str(told.message), told.category) == ("client 0: careful", RuntimeWarning)
        assert told.filename == __file__
    assert hashes(result) == hashes(run(SGDClient(weighting="samples"), "engine.chunks=3"))


@pytest.mark.slow
def test_errors_of_clients_on_workers(ray: str) -> None:
    def fails(error: Callable[[], BaseException], kind: type[BaseException] = ClientError) -> BaseException:
        with pytest.raises(kind) as caught:
            run(Raises(weighting="samples", error=error), ray, TWO)
        return caught.value

    cause = fails(lambda: OutOfLuckError(3)).__cause__
    assert isinstance(cause, OutOfLuckError)
    assert cause.left == 3
    assert "in fit" in cause.__notes__[0]
    stubborn = fails(StubbornError).__cause__
    assert "StubbornError: stuck" in str(stubborn)
    assert "SystemExit: 3" in str(fails(lambda: SystemExit(3)))
    fails(KeyboardInterrupt, KeyboardInterrupt)

    def debugger() -> BaseException:
        breakpoint()
        raise AssertionError

    assert "type engine=serial" in str(fails(debugger))
    assert "type engine=serial" in str(fails(lambda: OSError(input("? "))))


@pytest.mark.slow
def test_what_a_client_keeps_is_refused_on_workers_too(ray: str) -> None:
    keeper = Keeper(weighting="samples", how=KEPT["seen"])
    with pytest.raises(ClientError, match=r"client 2 in round 1: Keeper.seen has changed since setup"):
        run(keeper, "failures.policy=skip", ray, TWO)
