"""What clients keep outside of their state is refused by name where their updates depend on it, and said otherwise."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import pytest
from plainloop import seeded, simulated
from torch import Tensor, nn

from clients.base import Client
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.run.needs import check_whole
from strategies.fedavg import FedAvg

DRAWN = np.random.default_rng(0)
OWN, COUNTS = threading.local(), count()


def linear() -> nn.Module:
    return nn.Linear(4, 3)


class Own(FedAvg):
    """FedAvg with a client of a test."""

    kind: type[Client]

    def make_client(self) -> Client:
        return self.kind(weighting=self.weighting)  # type: ignore[call-arg]


def own(kind: type) -> Own:
    return type("Own", (Own,), {"kind": kind})(server_lr=1.0, weighting="samples")  # type: ignore[no-any-return]


class Ticking(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch, turns: list[int] = []) -> Tensor:  # noqa: B006
        turns.append(1)
        return job.descend(w, batch)


class Random(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.descend(w, batch) + 1e-3 * DRAWN.random()


def helper() -> float:
    helper.n += 1  # type: ignore[attr-defined]
    return helper.n  # type: ignore[attr-defined, no-any-return]


helper.n = 0  # type: ignore[attr-defined]


class Helped(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.descend(w, batch) + 1e-3 * helper()


class Writing(SGDClient):
    def begin(self, job: Job, w: Tensor) -> Tensor:
        x: Any = job.data.samples.x  # type: ignore[attr-defined]
        x.mul_(0.5)
        return w


@lru_cache
def first() -> dict[str, int]:
    return {"n": 0}


def on_task(job: Job) -> int:
    held = vars(job.task)
    held["n"] = held.get("n", 0) + 1
    return held["n"]  # type: ignore[no-any-return]


def on_model(job: Job) -> int:
    job.model.n = getattr(job.model, "n", 0) + 1  # type: ignore[attr-defined]
    return job.model.n  # type: ignore[attr-defined, no-any-return]


def on_torch(job: Job) -> int:
    nn.functional.n_ = getattr(nn.functional, "n_", 0) + 1  # type: ignore[attr-defined]
    return nn.functional.n_  # type: ignore[attr-defined, no-any-return]


def on_a_layers_class(job: Job) -> int:
    nn.Linear.n_ = getattr(nn.Linear, "n_", 0) + 1  # type: ignore[attr-defined]
    return nn.Linear.n_  # type: ignore[attr-defined, no-any-return]


def on_the_jobs_class(job: Job) -> int:
    type(job).n_ = getattr(type(job), "n_", 0) + 1  # type: ignore[attr-defined]
    return type(job).n_  # type: ignore[attr-defined, no-any-return]


def of_a_thread(job: Job) -> int:
    OWN.n = getattr(OWN, "n", 0) + 1
    return OWN.n  # type: ignore[no-any-return]


def in_a_cache(job: Job) -> int:
    first()["n"] += 1
    return first()["n"]


def in_the_environment(job: Job) -> int:
    os.environ["COUNTED"] = str(int(os.environ.get("COUNTED", "0")) + 1)
    return int(os.environ["COUNTED"])


def of_a_clock(job: Job) -> float:
    return time.perf_counter() % 1


def on_a_weight(job: Job) -> int:
    weight: Any = next(job.model.module.parameters())
    weight.n = getattr(weight, "n", 0) + 1
    return weight.n  # type: ignore[no-any-return]


class Counted(SGDClient):
    """Its update hangs on a number that it gets somewhere."""

    number: Callable[[Job], float]

    def fit(self, job: Job) -> Update:
        update, n = super().fit(job), type(self).number(job)
        return replace(update, arrays={**update.arrays, "delta": update.arrays["delta"] * n})


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (on_task, "job.task.n has changed"),
        (on_model, "job.model.n has changed"),
        (on_torch, "attribute 'n_' of torch.nn.functional has changed"),
        (on_a_layers_class, "attribute 'n_' of Linear has changed"),
        (on_the_jobs_class, "attribute 'n_' of Job has changed"),
        (of_a_thread, "in global 'OWN' of of_a_thread, has changed"),
        (in_a_cache, "the cache of first has changed"),
        (in_the_environment, "the environment's COUNTED has changed"),
        (of_a_clock, "time.perf_counter in of_a_clock is another each time"),
        (lambda job: next(COUNTS), "global 'COUNTS' of <lambda> has changed"),
    ],
)
def test_what_an_update_takes_from_elsewhere_is_refused(
    number: Callable[[Job], float], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (nn.functional, nn.Linear, Job):
        monkeypatch.setattr(place, "n_", 0, raising=False)
    monkeypatch.setenv("COUNTED", "0")
    with pytest.raises(ClientError, match=rf"client 0 in round 1: .*{named}"):
        simulated(seeded(linear), strategy=own(type("Mine", (Counted,), {"number": staticmethod(number)})))


def test_what_a_client_sets_on_a_weight_does_not_reach_the_next() -> None:
    found = [
        simulated(seeded(linear), strategy=own(kind)).rows[-1]["weights_hash"]
        for kind in (SGDClient, type("Mine", (Counted,), {"number": staticmethod(on_a_weight)}))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Random, "in global 'DRAWN' of Random.step, has changed"),
        (Helped, "attribute 'n' of helper"),
    ],
)
def test_what_steps_take_from_elsewhere_is_refused(kind: type, named: str) -> None:
    with pytest.raises(ClientError, match=named):
        simulated(seeded(linear), strategy=own(kind))


def test_what_clients_keep_elsewhere_without_an_effect_is_said() -> None:
    with pytest.warns(UserWarning, match=r"defaults of Ticking.step has changed"):
        simulated(seeded(linear), strategy=own(Ticking))


def test_a_clock_beside_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Timing(SGDClient):
        def fit(self, job: Job) -> Update:
            start = time.time()
            update = super().fit(job)
            return replace(update, metrics={**update.metrics, "took": time.time() - start})

    simulated(seeded(linear), strategy=own(Timing))
    assert "time.time in" in caplog.text and "asks a clock" in caplog.text


def test_who_writes_to_the_samples_is_refused() -> None:
    with pytest.raises(ClientError, match="wrote to the samples"):
        simulated(seeded(linear), strategy=own(Writing))


class Misspelt(SGDClient):
    def stpe(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return w

    def steps(self, w: Tensor) -> Tensor:
        return self.finished(w)

    def finished(self, w: Tensor) -> Tensor:
        return w


def test_a_method_that_is_nearly_called_like_another_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        method = own(Misspelt)
        check_whole(method)
        check_whole(own(Ticking))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "is called by nobody; is it step()?" in said[0]


class AsElsewhere(SGDClient):
    def train(self, job: Job) -> Update:
        return super().fit(job)


def test_a_method_named_as_in_other_libraries_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        check_whole(own(AsElsewhere))
    assert "AsElsewhere.train() is called by nobody; is it fit()?" in caplog.text
