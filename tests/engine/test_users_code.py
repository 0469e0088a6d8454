"""Clients' own code: what it must not keep, what it may draw, what it returns; the same on Ray."""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, classification, hashes, method, network
from torch import Tensor, nn

from clients.sgd import SGDClient
from fedsim.engine.watch import Watch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job

EVERYBODY = classification(cohorts=[range(6)] * 2)
TWO = "engine.workers=2"


def with_client(client: Any) -> Any:
    """FedAvg with another local half."""
    strategy = method("fedavg")
    strategy.client = client
    return strategy


def run(client: Any, *overrides: str, problem: Problem = EVERYBODY, **given: Any) -> Any:
    return problem.run("rounds=2", *overrides, strategy=with_client(client), **given)


# -- what a client keeps --------------------------------------------------------------------------------------------

TOTAL = 0
LOG: list[int] = []


@dataclass(frozen=True)
class Keeper(SGDClient):
    """Keeps something by ``how``, of what ``setup`` made."""

    how: Callable[[Keeper, Job], object] = field(kw_only=True)
    on_class = 0

    def setup(self, task: Any, layout: Any) -> None:
        vars(self).update(
            seen=[],
            table={"a": np.zeros(3)},
            vector=torch.zeros(3),
            net=nn.Linear(2, 2),
            draws=np.random.default_rng(1),
            spare=1,
        )

    @cached_property
    def squares(self) -> list[int]:
        """Follows from nothing but the client itself."""
        return [i * i for i in range(4)]

    def fit(self, job: Job) -> Update:
        if job.client == 2:
            self.how(self, job)
        return super().fit(job)


class Counts(SGDClient):
    """The counter that everybody writes first."""

    def fit(self, job: Job) -> Update:
        global TOTAL
        TOTAL += 1
        return super().fit(job)


class Logs(SGDClient):
    def fit(self, job: Job) -> Update:
        LOG.append(job.client)
        return super().fit(job)


def step_of_its_own(client: Any, job: Job) -> None:
    with torch.no_grad():
        client.net.weight -= 0.1


KEPT: dict[str, Callable[[Any, Job], object]] = {
    "count": lambda c, job: vars(c).update(count=1),
    "spare": lambda c, job: vars(c).pop("spare"),
    "seen": lambda c, job: c.seen.append(job.client),
    "table['b']": lambda c, job: c.table.update(b=1),
    "table['a']": lambda c, job: c.table["a"].__iadd__(1),
    "vector": lambda c, job: c.vector.add_(1),
    "vector ": lambda c, job: c.vector.data.add_(1),
    "net.weight": step_of_its_own,
    "draws": lambda c, job: c.draws.random(),
    "on_class": lambda c, job: setattr(type(c), "on_class", 1),
    "squares": lambda c, job: c.squares.append(3) if len(c.squares) > 4 - job.round else None,
}


@pytest.mark.parametrize("what", KEPT)
def test_what_a_client_keeps_outside_its_state_is_refused_by_name(what: str) -> None:
    with pytest.raises(ClientError, match="has changed since setup") as caught:
        run(Keeper(weighting="samples", how=KEPT[what]), "failures.policy=skip")
    Keeper.on_class = 0
    text, at = str(caught.value), 2 if what == "squares" else 1
    assert f"client 2 in round {at}: Keeper.{what.strip()} has changed" in text
    assert "Update.state" in text
    assert "job.keep" in text


@pytest.mark.parametrize("client", [Counts, Logs])
def test_globals_that_client_code_changes_are_refused(client: type[SGDClient]) -> None:
    named = "TOTAL" if client is Counts else "LOG"
    with pytest.raises(ClientError, match=rf"client 0 in round 1: global {named} has changed since setup"):
        run(client(weighting="samples"), "failures.policy=skip")


def test_what_setup_made_may_be_read_and_a_cached_property_used() -> None:
    reads = Keeper(weighting="samples", how=lambda c, job: (c.squares, c.vector + 1, c.net(torch.ones(2))))
    assert hashes(run(reads)) == hashes(run(SGDClient(weighting="samples")))


def test_watching_the_clients_that_come_with_fedsim_looks_at_their_settings_alone() -> None:
    watch = Watch(SGDClient(weighting="samples"))
    assert (len(watch._held), watch._tensors, watch._read) == (1, [], [])


# -- what it draws --------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Draws from all three global generators, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * (torch.randn(1) + np.random.randn() + random.random())


def noisy(**changes: Any) -> Problem:
    """Six clients of which all draw; the test set is measured in several batches."""
    parts: dict[str, Any] = {"model": network("tanh", 4, 3, Noise()), "cohorts": [range(6)] * 2}
    return classification(**{**parts, **changes})


DRAWN = ("rounds=2", "evaluation.every=1", "evaluation.batch_size=3", "engine.chunks=4")


def numbers(result: Any) -> list[Any]:
    return [(row["weights_hash"], row["loss"]) for row in result.rows]


def test_draws_of_users_repeat_and_leave_their_own_generators_alone() -> None:
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    np.random.randn()  # leaves the second of a pair behind
    before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    first = noisy().run(*DRAWN)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_equal(np.random.get_state(legacy=False), before[1])
    assert random.getstate() == before[2]
    torch.manual_seed(4), np.random.seed(5), random.seed(6)
    assert numbers(noisy().run(*DRAWN)) == numbers(first)
    other = noisy().run(*DRAWN, "engine.chunks=1", "evaluation.every=1000")  # nor on who came before
    assert other.rows[0]["train_loss"] == first.rows[0]["train_loss"]
    assert numbers(noisy().run(*DRAWN, "seed=1")) != numbers(first)


@pytest.mark.slow
def test_draws_are_the_same_on_any_number_of_workers(ray: str) -> None:
    here = numbers(noisy().run(*DRAWN))
    assert numbers(noisy().run(*DRAWN, ray, "engine.workers=1")) == here
    assert numbers(noisy().run(*DRAWN, ray, TWO)) == here


# -- what it returns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returns(SGDClient):
    """Returns what ``hook`` gives in the place of what the method named ``at`` returns."""

    at: str = field(kw_only=True)
    hook: Callable[[Any], Any] = field(kw_only=True)

    def begin(self, job: Job, w: Tensor) -> Tensor:
        return self._at("begin", super().begin(job, w))

    def step(self, job: Job, w: Tensor, batch: Any) -> Tensor:
        return self._at("step", super().step(job, w, batch))

    def finish(self, job: Job, w: Tensor) -> Update:
        return self._at("finish", super().finish(job, w))

    def fit(self, job: Job) -> Update:
        return self._at("fit", super().fit(job))

    def init_state(self, layout: Any) -> dict[str, Tensor]:
        return self._at("init_state", {})

    def _at(self, name: str, value: Any) -> Any:
        return self.hook(value) if name == self.at else value


def sends(**parts: Any) -> Callable[[Update], Update]:
    return lambda u: Update(**{**vars(u), **parts})


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    ("begin", lambda w: None, "Returns.begin returned None, expected the new w"),
    (
        "step",
        lambda w: None,
        r"Returns.step returned None, expected the new w, a tensor of shape \(\d+,\); is there",
    ),
    ("step", lambda w: 0.5, "Returns.step returned float, expected the new w"),
    ("step", lambda w: w[:3], r"a vector of shape \(3,\) for a model whose vectors are"),
    ("finish", lambda u: None, "Returns.finish returned None, expected an Update"),
    ("fit", lambda u: None, "Returns.fit returned None, expected an Update"),
    ("fit", lambda u: u.arrays, "Returns.fit returned dict, expected an Update"),
    ("fit", sends(arrays={}), r"the update holds \[\], but the strategy folds \['delta'\]"),
    (
        "fit",
        sends(arrays={"delta": torch.zeros(1)}),
        r"'delta' has shape \(1,\), but the received model w has",
    ),
    ("fit", sends(arrays=torch.zeros(3)), r"Update\(arrays=...\) as Tensor of shape \(3,\), expected a dict"),
    ("fit", sends(weight=-1), r"Update\(weight=-1\) is negative"),
    ("fit", sends(weight=torch.ones(2)), r"Update\(weight\) as Tensor of shape \(2,\), expected one number"),
    ("fit", sends(weight=None), r"Update\(weight\) as None, expected one number"),
    ("fit", sends(weight=float("nan")), r"non-finite values in the weight \(nan\)"),
    ("fit", sends(metrics={"good": "yes"}), r"Update\(metrics\['good'\]\) as str, expected one number"),
    ("fit", sends(state={"n": 3}), r"Update\(state\['n'\]\) as int, expected a tensor"),
]


@pytest.mark.parametrize(("at", "hook", "said"), WRONG)
def test_what_a_client_returns_wrongly_is_named(at: str, hook: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ClientError, match=rf"client 0 (failed|nonfinite) in round 1(?s:.*){said}"):
        run(Returns(weighting="samples", at=at, hook=hook), "failures.nonfinite=stop")


def test_a_first_state_that_is_none_is_named() -> None:
    with pytest.raises(ClientError, match=r"Returns.init_state returned None, expected a dict of tensors"):
        run(Returns(weighting="samples", at="init_state", hook=lambda state: None))


def test_one_number_is_taken_however_it_is_written() -> None:
    plain = run(SGDClient(weighting="uniform"))
    hook = sends(weight=torch.tensor(1.0), metrics={"a": np.float32(0.5), "b": torch.tensor([2])})
    found = run(Returns(weighting="samples", at="fit", hook=hook))
    assert hashes(found) == hashes(plain)
    table = found.per_client
    assert set(table[table.metric == "a"].value) == {0.5}
    assert set(table[table.metric == "b"].value) == {2.0}


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
