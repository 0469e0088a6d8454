"""Clients' own code: what it must not keep, what it may draw, what it returns; the same on Ray."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, classification, hashes, network
from torch import Tensor, nn
from users import KEPT, TWO, Keeper, run

from clients.sgd import SGDClient
from fedsim.engine.watch import Watch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job

# -- what a client keeps --------------------------------------------------------------------------------------------

TOTAL = 0
LOG: list[int] = []


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


class OnBase(SGDClient):
    def fit(self, job: Job) -> Update:
        SGDClient.calls = 1  # type: ignore[attr-defined]
        return super().fit(job)


def test_what_a_client_keeps_on_the_simulators_classes_is_refused() -> None:
    try:
        with pytest.raises(ClientError, match=r"client 0 in round 1: OnBase\.calls has changed since setup"):
            run(OnBase(weighting="samples"), "failures.policy=skip")
    finally:
        del SGDClient.calls  # type: ignore[attr-defined]


@dataclass
class Notes:
    n: int = 0


NOTES = Notes()


class Late(SGDClient):
    """Keeps nothing before its third job."""

    def fit(self, job: Job) -> Update:
        NOTES.n += job.round > 0
        return super().fit(job)


def test_what_is_kept_only_later_is_said_too() -> None:
    with pytest.warns(
        UserWarning, match=r"attribute 'n' of Notes, in global 'NOTES' of Late.fit, has changed"
    ):
        run(Late(weighting="samples"))


class Settles(SGDClient):
    """Leaves torch in another state, and something on a layer of torch's."""

    def fit(self, job: Job) -> Update:
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(True)
        layer = next(m for m in job.model.module.modules() if isinstance(m, nn.Linear))
        layer.scale = getattr(layer, "scale", 0) + 1  # type: ignore[assignment, operator]
        layer.eval()
        update = super().fit(job)
        delta = update.arrays["delta"]
        return replace(update, arrays={**update.arrays, "delta": delta * layer.scale})  # type: ignore[operator]


def test_what_a_client_sets_in_torch_or_on_a_layer_does_not_reach_the_next() -> None:
    before = torch.get_default_dtype()
    assert hashes(run(Settles(weighting="samples"))) == hashes(run(SGDClient(weighting="samples")))
    assert torch.get_default_dtype() is before


class Unrepeatable(SGDClient):
    def fit(self, job: Job) -> Update:
        return super().fit(job) if unsettled() < 2 else None  # type: ignore[return-value]


def unsettled() -> float:
    return float(np.random.default_rng().random())


def test_draws_without_a_seed_are_said(caplog: pytest.LogCaptureFixture) -> None:
    run(Unrepeatable(weighting="samples"), "rounds=1")
    assert "default_rng() in unsettled gives something else in every process" in caplog.text


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


def test_runs_in_threads_take_turns_and_draw_what_they_would_alone(caplog: pytest.LogCaptureFixture) -> None:
    inside = Waiting()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(noisy().run, *DRAWN, callbacks=[inside])
        inside.begun.wait(20)
        second = pool.submit(noisy().run, *DRAWN)
        while "another thread" not in caplog.text and not second.done():
            time.sleep(0.01)
        inside.go_on.set()
        found = first.result(), second.result()
    assert numbers(found[0]) == numbers(found[1]) == numbers(noisy().run(*DRAWN))


class Waiting:
    """A callback that stops the first round until it may go on, and has a run of its own meanwhile."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def round(self, row: Any, clients: Any) -> None:
        self.begun.set()
        self.go_on.wait(20)
        classification().run("rounds=1")  # a run within a run does not wait


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
